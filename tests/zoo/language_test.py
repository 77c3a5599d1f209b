"""A small model written as a GGUF file, opened as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, train, zoo

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

OPTIONS = {
    "vocab_size": 32,
    "width": 32,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 64,
    "max_positions": 16,
}
TOKENS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "abcd", "Ġ"]
METADATA = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([3, 3] + 30 * [1], np.int32),
    "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Path of the file, and the parameters that were written."""
    path = tmp_path_factory.mktemp("tiny") / "x.gguf"
    like = jax.eval_shape(models.Decoder(**OPTIONS).init, jax.random.key(0), IDS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), like["params"]
    )
    tensors = io.names.gguf_llama(METADATA, tied=True).save(params)
    io.gguf.save(path, tensors, {**METADATA, "tokenizer.chat_template": TEMPLATE})
    return path, params


def test_model_tokenizer_and_template_fit_together(saved):
    path, params = saved
    found = zoo.open_gguf(path.parent)
    assert found.name == "tiny"
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    got = found.module.apply({"params": found.params}, IDS)
    want = models.Decoder(**OPTIONS).apply({"params": params}, IDS)
    np.testing.assert_array_equal(got, want)
    text = found.chat.render([{"role": "user", "content": "abcd"}])
    assert text == "<s>abcd"
    assert found.tokenizer.encode(text, add_special_tokens=False).ids == [0, 30]
    assert found.special == {
        "bos": 0,
        "eos": 1,
        "unknown": None,
        "padding": None,
        "end_of_turn": None,
    }


def test_options_beside_those_of_the_file(saved):
    found = zoo.open_gguf(
        saved[0], name="mine", scan=True, param_dtype="bfloat16", dtype="bfloat16"
    )
    assert found.name == "mine"
    assert found.module.scan
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match="no option 'depht'"):
        zoo.open_gguf(saved[0], depht=3)


def test_parameters_are_placed_by_the_rules(saved):
    path, params = saved
    mesh = train.make_mesh(data=4, model=2)
    found = zoo.open_gguf(path, mesh=mesh)
    kernel = found.params["layers_0"]["mlp"]["in"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("data", "model")
    assert kernel.addressable_shards[0].data.shape == (8, 32)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_a_file_without_template(saved, tmp_path):
    file = io.gguf.GgufFile(saved[0])
    io.gguf.save(tmp_path / "x.gguf", dict(file), METADATA)
    assert zoo.open_gguf(tmp_path / "x.gguf").chat is None
