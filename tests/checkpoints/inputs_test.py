import json

import numpy as np
import pytest

from mtl_jax.checkpoints import _inputs, recipe

pytestmark = pytest.mark.fast

LINEAR = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def opened(tmp_path):
    """`opened(text)`: the inputs of a recipe in the folder of the models."""

    def read(text=LINEAR):
        return _inputs.open_inputs(recipe.parse_recipe(text, folder=tmp_path))

    return read


def tables(inputs, name):
    return [c.tensors[name].whole() for c in inputs.checkpoints.values()]


def test_a_redundant_copy_of_a_tied_head_is_dropped(tmp_path, save_llama, opened):
    save_llama(tmp_path / "a", 1, drop=(HEAD,), tie_word_embeddings=True)
    save_llama(tmp_path / "b", 2, tie_word_embeddings=True)
    found = opened()
    assert all(HEAD not in c.tensors for c in found.checkpoints.values())
    assert not found.untied


def test_a_head_of_its_own_unties(tmp_path, save_llama, opened):
    one = save_llama(tmp_path / "a", 1, drop=(HEAD,), tie_word_embeddings=True)
    other = save_llama(tmp_path / "b", 2)
    found = opened()
    assert found.untied
    for table, wanted in zip(
        tables(found, HEAD), (one[EMBED], other[HEAD]), strict=True
    ):
        np.testing.assert_array_equal(table, wanted)


def test_a_missing_head_is_not_invented(tmp_path, save_llama, opened):
    save_llama(tmp_path / "a", 1, drop=(HEAD,))
    save_llama(tmp_path / "b", 2)
    found = opened()
    (a, b) = found.checkpoints.values()
    assert HEAD not in a.tensors and HEAD in b.tensors and not found.untied


def test_other_tokenizers_want_a_word(tmp_path, save_llama, opened):
    save_llama(tmp_path / "a", 1, rows=5)
    swapped = {"a": 0, "<s>": 1, "</s>": 2, "w4": 3, "w3": 4}
    b = save_llama(tmp_path / "b", 2, rows=5, tokens=swapped)
    with pytest.raises(ValueError, match=r"'w4' \(4 and 3\)"):
        opened()
    found = opened(LINEAR + "tokenizer_source: base")
    np.testing.assert_array_equal(tables(found, EMBED)[1], b[EMBED][[0, 1, 2, 4, 3]])
    np.testing.assert_array_equal(tables(found, HEAD)[1], b[HEAD][[0, 1, 2, 4, 3]])


def test_rows_of_the_union(tmp_path, save_llama, opened):
    common = {"a": 0, "<s>": 1, "</s>": 2}
    # Another number of the config equals the rows of `a`: names tell vocabularies.
    a = save_llama(tmp_path / "a", 1, rows=4, dim=4, tokens={**common, "x": 3})
    b = save_llama(
        tmp_path / "b", 2, rows=5, dim=4, tokens={**common, "<y>": 3, "z": 4}
    )
    found = opened(LINEAR + "tokenizer_source: union")
    assert found.vocabulary.ids == {**common, "x": 3, "z": 4, "<y>": 5}
    for name in (EMBED, HEAD):
        first, second = tables(found, name)
        wanted = np.concatenate([a[name][:3], a[name][3:], b[name][4:], b[name][3:4]])
        np.testing.assert_array_equal(first, wanted)
        wanted = np.concatenate([b[name][:3], a[name][3:], b[name][4:], b[name][3:4]])
        np.testing.assert_array_equal(second, wanted)
    norms = tables(found, "model.norm.weight")
    assert all(norm.shape == (4,) for norm in norms)


def test_padded_rows_are_not_cut(tmp_path, save_llama, opened):
    tokens = {"a": 0, "<s>": 1, "</s>": 2}
    a = save_llama(tmp_path / "a", 1, rows=8, tokens=tokens)
    save_llama(tmp_path / "b", 2, rows=3, tokens=tokens)
    found = opened(LINEAR + "tokenizer_source: base")
    first, second = tables(found, EMBED)
    np.testing.assert_array_equal(first, a[EMBED])
    np.testing.assert_array_equal(second[3:], a[EMBED][3:])


@pytest.mark.parametrize("dim", [16, 4])
def test_tokens_along_another_axis_are_refused(tmp_path, save_llama, opened, dim):
    """Whether or not another number of the config equals that of the tokens."""
    bias = {"final_logits_bias": np.zeros((1, 4), np.float32)}
    for name, swap in (("a", "xy"), ("b", "yx")):
        tokens = dict(zip(("a", "<s>", *swap), range(4), strict=True))
        save_llama(tmp_path / name, rows=4, dim=dim, tokens=tokens, extra=bias)
    wanted = r"'final_logits_bias' of b is \[1, 4\]: its 4 tokens are not rows"
    with pytest.raises(ValueError, match=wanted):
        opened(LINEAR + "tokenizer_source: base")


def test_a_model_that_does_not_take_part_gives_its_tokenizer(
    tmp_path, save_llama, save_tokenizer, opened
):
    a = save_llama(tmp_path / "a", 1, rows=3, tokens={"a": 0, "b": 1, "c": 2})
    save_llama(tmp_path / "b", 2, rows=3, tokens={"a": 0, "b": 1, "c": 2})
    save_tokenizer(tmp_path / "t", {"c": 0, "n": 1, "a": 2})
    first, _ = tables(opened(LINEAR + "tokenizer_source: t"), EMBED)
    np.testing.assert_array_equal(first[[0, 2]], a[EMBED][[2, 0]])
    assert not first[1].any()


def test_a_model_without_tokenizer_is_like_the_first(tmp_path, save_llama, opened):
    save_llama(tmp_path / "a", 1)
    save_llama(tmp_path / "b", 2, tokens={})
    found = opened(LINEAR + "tokenizer_source: base")
    assert "b has no tokenizer" in found.notes[0]
    save_llama(tmp_path / "b", 2, tokens={}, rows=30)
    with pytest.raises(ValueError, match="b has no tokenizer"):
        opened(LINEAR + "tokenizer_source: base")


def test_an_adapter_alone_is_refused(tmp_path, save_llama, opened):
    save_llama(tmp_path / "a", 1)
    factors = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight": np.ones(
            shape, np.float32
        )
        for x, shape in (("A", (2, 16)), ("B", (32, 2)))
    }
    from mtl_jax.io import safetensors

    (tmp_path / "b").mkdir()
    safetensors.save(tmp_path / "b" / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config["target_modules"] = ["up_proj"]
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"b is an adapter alone.*write BASE\+b"):
        opened()
