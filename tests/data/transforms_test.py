import json

import numpy as np
import pytest

from mtl_jax import data

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tiny WordPiece tokenizer with MiniLM's special tokens, via its JSON file."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *["a", "movie", "review", "good", "bad"],
    ]
    vocab = {word: i for i, word in enumerate(words)}
    tok = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tok.enable_padding(length=128)
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    tok.save(str(path))
    return data.minilm_tokenizer(path)


def test_tokens_are_padded_and_masked(tokenizer):
    found = data.Tokenize(tokenizer, 6)({"text": b"good movie", "label": np.int64(1)})
    np.testing.assert_array_equal(found["input_ids"], [2, 7, 5, 3, 0, 0])
    np.testing.assert_array_equal(found["attention_mask"], [1, 1, 1, 1, 0, 0])
    assert found["label"] == 1
    assert {v.dtype for v in found.values()} == {np.dtype(np.int32)}


def test_long_texts_keep_their_special_tokens(tokenizer):
    found = data.Tokenize(tokenizer, 4)({"text": "a bad bad bad movie", "label": 0})
    np.testing.assert_array_equal(found["input_ids"], [2, 4, 8, 3])


def test_the_callers_tokenizer_is_left_alone(tokenizer):
    before = tokenizer.to_str()
    data.Tokenize(tokenizer, 4)
    assert tokenizer.to_str() == before
    assert len(tokenizer.encode("a " * 50).ids) == 52


def test_no_room_for_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="length 2 has no room beside 2 special"):
        data.Tokenize(tokenizer, 2)


@pytest.mark.parametrize("length, wanted", [(1, 8), (8, 8), (9, 12), (512, 512)])
def test_bucket(length, wanted):
    assert data.bucket(length) == wanted


def test_bucket_has_an_end():
    with pytest.raises(ValueError, match="513 tokens, longest bucket is 512"):
        data.bucket(513)


def test_fit_length_covers_the_asked_fraction(tokenizer):
    texts = ["a " * 5] * 90 + ["a " * 30] * 10
    source = [{"text": text.encode()} for text in texts]
    assert data.fit_length(source, tokenizer, coverage=0.8) == 8
    assert data.fit_length(source, tokenizer, coverage=1.0) == 32


def test_prompt_arrays(tokenizer):
    found = data.prompt_arrays("sentiment_movie", tokenizer=tokenizer, length=12)
    assert found["input_ids"].shape == found["attention_mask"].shape == (4, 12)
    np.testing.assert_array_equal(found["label"], [0, 0, 1, 1])


def test_image_tasks_have_no_prompts():
    with pytest.raises(ValueError, match="'digits' has no prompts"):
        data.prompt_arrays("digits")


def test_normalize_scales_and_repeats_the_channel():
    image = np.array([[[0], [255]], [[51], [204]]], np.uint8)
    found = data.Normalize()({"image": image, "label": 3})
    wanted = np.array([[-1, 1], [-0.6, 0.6]], np.float32)
    assert found["image"].dtype == np.float32
    for channel in range(3):
        np.testing.assert_allclose(found["image"][..., channel], wanted, atol=1e-6)


def test_normalize_uses_statistics_per_channel():
    image = np.full((2, 2, 3), 255, np.uint8)
    found = data.Normalize(mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 2.0))
    found = found({"image": image, "label": 0})["image"]
    np.testing.assert_allclose(found[0, 0], [1.0, 2.0, 0.0], atol=1e-6)


def test_normalize_resizes_and_cuts_the_centre():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    found = data.Normalize(size=10)({"image": image, "label": 0})["image"]
    assert found.shape == (10, 10, 3)
    assert found[:, 1:-1].min() > 0.9


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3)), np.zeros((2, 2, 4))]
)
def test_normalize_refuses_other_arrays(image):
    with pytest.raises(ValueError, match=r"wanted uint8\[H, W, 1 or 3\]"):
        data.Normalize()({"image": image, "label": 0})


def test_transform_picks_by_kind(tokenizer):
    assert data.transform("icd10_chapter", tokenizer=tokenizer).length == 24
    assert data.transform("icd10_chapter", tokenizer=tokenizer, length=9).length == 9
    assert data.transform("mnist5k", size=28) == data.Normalize(28)


def test_unknown_tasks_are_refused_with_the_list():
    with pytest.raises(ValueError, match="unknown task 'sst2'; known: cars, digits"):
        data.get("sst2")


@pytest.mark.parametrize("task", data.tasks().values(), ids=lambda t: t.name)
def test_registered_tasks_are_complete(task):
    assert data.get(task.name) is not None
    assert task.source and task.licence
    assert json.dumps(task.class_names)
    if task.tfds_name:
        return
    assert len(task.class_names) == len(set(task.class_names)) == task.num_classes
    if task.kind == "text":
        assert task.length == data.bucket(task.length)
        assert all(len(group) >= 2 for group in task.prompts)
    else:
        assert task.image_shape[:2] == (32, 32)


def test_a_task_with_missing_class_names_is_refused():
    with pytest.raises(ValueError, match="class_names has 1 entries, wanted 2"):
        data.Task(
            name="t",
            kind="text",
            num_classes=2,
            class_names=("a",),
            licence="",
            source="",
        )


def test_the_suites_have_the_promised_members():
    assert len(data.TEXT_TASKS) == 8
    assert set(data.VISION_TASKS) >= {"digits", "mnist5k", "easy_vqa_shape"}
    assert list(data.PAPER_VISION_TASKS) == (
        ["cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "svhn", "sun397"]
    )
