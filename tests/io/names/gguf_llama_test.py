"""The llama layout of GGUF, on the decoder's own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, tree
from mtl_jax.io.names._gguf_llama import gguf_llama, rotary_rows

SIZES = {
    "context_length": 16,
    "embedding_length": 12,
    "block_count": 2,
    "feed_forward_length": 20,
    "attention.head_count": 6,
    "attention.head_count_kv": 3,
    "attention.key_length": 4,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "vocab_size": 11,
}


def metadata(architecture="llama", **changes):
    sizes = {**SIZES, **{k.replace("__", "."): v for k, v in changes.items()}}
    kept = {f"{architecture}.{k}": v for k, v in sizes.items() if v is not None}
    return {"general.architecture": architecture, **kept}


def abstract(table, config, **options):
    module = models.build(table.model, **table.options(config), **options)
    example = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def filled(like):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_both_ways_on_the_decoder(architecture, tied, scan):
    config = metadata(architecture)
    table = gguf_llama(config, tied=tied)
    params = filled(abstract(table, config, scan=scan))
    tensors = {name: np.asarray(leaf) for name, leaf in table.save(params).items()}
    assert ("output.weight" in tensors) is not tied
    assert_same(table.load(tensors, params), params)
    unrolled = models.unstack_layers(params) if scan else params
    assert_same(table.load(tensors), unrolled)
    # Every rule is used.
    paths = set(tree.paths(unrolled))
    assert {rule.path.replace("{i}", "1") for rule in table.rules} <= paths


@pytest.mark.fast
def test_names_and_axes_are_those_of_the_format():
    config = metadata()
    table = gguf_llama(config, tied=False)
    tensors = table.save(filled(abstract(table, config)))
    shapes = {n: x.shape for n, x in tensors.items() if not n.startswith("blk.1.")}
    assert shapes == {
        "token_embd.weight": (11, 12),
        "blk.0.attn_norm.weight": (12,),
        "blk.0.attn_q.weight": (24, 12),
        "blk.0.attn_k.weight": (12, 12),
        "blk.0.attn_v.weight": (12, 12),
        "blk.0.attn_output.weight": (12, 24),
        "blk.0.ffn_norm.weight": (12,),
        "blk.0.ffn_gate.weight": (20, 12),
        "blk.0.ffn_up.weight": (20, 12),
        "blk.0.ffn_down.weight": (12, 20),
        "output_norm.weight": (12,),
        "output.weight": (11, 12),
    }


@pytest.mark.fast
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rotated_rows_come_back_in_the_order_of_halves(name):
    """Rows 2 j and 2 j + 1 of a head there are rows j and j + d / 2 here."""
    heads, dim, width = {"q": 6, "k": 3, "v": 3}[name], 4, 12
    table = gguf_llama(metadata(), tied=True)
    weight = np.random.default_rng(0).normal(size=(heads * dim, width))
    want = np.empty_like(weight)
    for head in range(heads):
        for j in range(dim // 2):
            for half in range(2):
                stored = j + half * dim // 2 if name == "v" else 2 * j + half
                target = head * dim + j + half * dim // 2
                want[target] = weight[head * dim + stored]
    (rule,) = (r for r in table.rules if r.name.endswith(f"attn_{name}.weight"))
    np.testing.assert_array_equal(rule.hook.load(weight), want.T)
    np.testing.assert_array_equal(rule.hook.save(want.T), weight)


@pytest.mark.fast
def test_other_architectures_keep_their_rows():
    for architecture in ("qwen2", "qwen3"):
        table = gguf_llama(metadata(architecture), tied=True)
        (rule,) = (r for r in table.rules if r.name.endswith("attn_q.weight"))
        x = np.arange(24 * 12).reshape(24, 12)
        np.testing.assert_array_equal(rule.hook.load(x), x.T)


@pytest.mark.fast
def test_rows_of_a_bias():
    weight, bias = rotary_rows(3), rotary_rows(3, bias=True)
    x = np.arange(12.0)
    np.testing.assert_array_equal(bias.load(x), weight.load(x[:, None])[0])
    np.testing.assert_array_equal(bias.save(bias.load(x)), x)


@pytest.mark.fast
def test_options():
    want = {
        "vocab_size": 11,
        "width": 12,
        "depth": 2,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 4,
        "mlp_dim": 20,
        "max_positions": 16,
        "norm_eps": 1e-5,
        "rotary_base": 10_000.0,
        "rotary_scaling": None,
        "qkv_bias": False,
        "qk_norm": None,
        "tied": True,
    }
    assert gguf_llama(metadata(), tied=True).options(metadata()) == want
    config = metadata(
        attention__head_count_kv=None,
        attention__key_length=None,
        vocab_size=None,
        rope__freq_base=5e5,
        rope__scaling__type="linear",
        rope__scaling__factor=4.0,
    )
    config["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    assert gguf_llama(config, tied=False).options(config) == {
        **want,
        "vocab_size": 3,
        "num_kv_heads": 6,
        "head_dim": 2,
        "rotary_base": 5e5,
        "rotary_scaling": {"type": "linear", "factor": 4.0},
        "tied": False,
    }


@pytest.mark.fast
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_the_frequencies_become_the_scaling_of_llama_3(factor):
    scaling = {
        "type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }
    frequencies = models.layers.rotary_frequencies
    plain, stretched = frequencies(128, 5e5), frequencies(128, 5e5, scaling)
    factors = (plain / stretched).astype(np.float32)
    config = metadata(attention__key_length=128, rope__freq_base=5e5)
    table = gguf_llama(config, tied=True, rope_factors=factors)
    assert table.options(config)["rotary_scaling"] == scaling
    factors[40] *= 1.1
    with pytest.raises(ValueError, match="is not the scaling of Llama 3"):
        gguf_llama(config, tied=True, rope_factors=factors)
    ones = np.ones_like(factors)
    table = gguf_llama(config, tied=True, rope_factors=ones)
    assert table.options(config)["rotary_scaling"] is None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": 2.0}, "block_count=2.0 is not supported, only one positive"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon=nan is not"),
        ({"block_count": None}, "metadata lacks llama.block_count"),
        ({"embedding_length": 0}, "embedding_length=0 is not supported"),
        ({"attention__head_count": np.array([2, 4])}, "only one positive number"),
        ({"attention__head_count": True}, "head_count=True is not supported"),
        ({"attention__key_length": None, "embedding_length": 13}, "6 heads do not spl"),
        ({"attention__value_length": 8}, "value_length=8 is not supported, only 4"),
        ({"rope__dimension_count": 2}, "rope.dimension_count=2 is not supported"),
        ({"expert_count": 8}, "expert_count=8 is not supported"),
        ({"rope__scaling__type": "yarn"}, "scaling.type='yarn' is not supported"),
        ({"rope__scaling__type": "linear"}, "lacks llama.rope.scaling.factor"),
        ({"rope__scaling__type": np.ones(2)}, "scaling.type=.* is not supported"),
        ({"expert_count": np.array([0, 0])}, "expert_count=.* is not supported"),
        ({"logit_scale": 2.0}, "llama.logit_scale=2.0 is not supported"),
        ({"vocab_size": None}, "metadata lacks llama.vocab_size"),
    ],
)
def test_metadata_is_read_strictly(changes, message):
    with pytest.raises(ValueError, match=f"names.gguf_llama: .*{message}"):
        gguf_llama(metadata(**changes), tied=True)


@pytest.mark.fast
def test_other_architectures_are_refused():
    for name in (None, "rwkv", ["llama"], np.ones(2)):
        config = {"general.architecture": name}
        with pytest.raises(ValueError, match="only 'llama', 'qwen2', 'qwen3'"):
            gguf_llama(config, tied=True)


@pytest.mark.fast
def test_rows_that_do_not_split_into_heads_are_named():
    table = gguf_llama(metadata(), tied=True)
    params = filled(abstract(table, metadata()))
    tensors = {name: np.asarray(leaf) for name, leaf in table.save(params).items()}
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_k.weight"][:10]
    with pytest.raises(
        ValueError, match=r"'blk\.1\.attn_k\.weight' is \(10, 12\): its rows do not"
    ):
        table.load(tensors)
    assert io.names.NameTable in type(table).__mro__
