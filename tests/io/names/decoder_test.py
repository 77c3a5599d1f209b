"""The tables of decoders, both ways, and how they read configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import io, models, tree

SIZES = {
    "vocab_size": 11,
    "width": 8,
    "depth": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 12,
    "max_positions": 6,
    "tied": False,
}
BIASES = {"qkv_bias": True, "out_bias": True}
CASES = {
    "llama": (io.names.llama, {**BIASES, "mlp_bias": True}),
    "qwen2": (io.names.qwen2, {"qkv_bias": True}),
    "qwen3": (io.names.qwen3, {**BIASES, "qk_norm": "head"}),
    "gemma": (io.names.gemma, {**BIASES, "norm_unit_offset": True}),
    "gemma2": (io.names.gemma2, {**BIASES, "post_norms": True}),
    "gpt2": (
        io.names.gpt2,
        {
            **BIASES,
            "num_kv_heads": None,
            "mlp_bias": True,
            "norm": "layer",
            "position": "learned",
            "gated": False,
        },
    ),
    "olmoe": (io.names.olmoe, {"qk_norm": "projection", "num_experts": 3}),
}


def abstract(case, **options):
    table, own = CASES[case]
    module = models.build(table.model, **{**SIZES, **own, **options})
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]


def foreign(case, **options):
    table, _ = CASES[case]
    rng = np.random.default_rng(0)
    like = abstract(case, **options)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
    return params, {k: np.asarray(v) for k, v in table.save(params).items()}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", CASES)
def test_save_then_load_is_identity(case):
    table, _ = CASES[case]
    params, tensors = foreign(case)
    assert_same(table.load(tensors), params)
    assert_same(table.load(tensors, abstract(case)), params)
    scanned = table.load(tensors, abstract(case, scan=True))
    assert_same(models.unstack_layers(scanned), params)
    again = table.save(scanned)
    assert set(again) == set(tensors)
    for name, leaf in again.items():
        array = np.asarray(leaf)
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize("case", CASES)
def test_every_rule_is_used_and_unique(case):
    table, _ = CASES[case]
    for column in ("name", "path"):
        values = [getattr(rule, column) for rule in table.rules]
        assert len(set(values)) == len(values)
    paths = {
        path.replace("layers_2", "layers_{i}") for path in tree.paths(abstract(case))
    }
    assert {rule.path for rule in table.rules} <= paths


@pytest.mark.parametrize("case", CASES)
def test_tied_models_drop_a_repeated_head_and_untied_ones_want_it(case):
    table, _ = CASES[case]
    params, tensors = foreign(case)
    tied = table.load(tensors, abstract(case, tied=True))
    assert_same(tied, {k: v for k, v in params.items() if k != "head"})
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: 'lm_head\.weight'"):
        table.load(tensors, abstract(case))


def test_a_bias_that_the_model_lacks_is_not_lost():
    _, tensors = foreign("llama")
    name = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"unexpected: '{name}'"):
        io.names.llama.load(tensors, abstract("llama", qkv_bias=False))
    del tensors[name]
    with pytest.raises(ValueError, match=f"missing: '{name}'"):
        io.names.llama.load(tensors, abstract("llama"))


def test_names_without_the_head_and_old_buffers_are_known():
    params, tensors = foreign("qwen2")
    bare = {k.removeprefix("model."): v for k, v in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1)
    assert_same(io.names.qwen2.load(bare), params)
    params, tensors = foreign("gpt2")
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 6, 6))
    bare["h.0.attn.masked_bias"] = np.ones(())
    assert_same(io.names.gpt2.load(bare), params)


def test_gpt2_keeps_query_key_and_value_in_one_tensor():
    params, tensors = foreign("gpt2")
    own = params["layers_1"]["attention"]
    want = np.concatenate([own[n]["kernel"] for n in ("query", "key", "value")], -1)
    np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.weight"], want)
    assert not [name for name in tensors if "query" in name or ".key." in name]
    tensors["transformer.h.1.attn.c_attn.bias"] = np.ones(23)
    with pytest.raises(ValueError, match=r"here: .*c_attn\.bias' is \(23,\), wanted"):
        io.names.gpt2.load(tensors, where="here")


def test_olmoe_has_one_tensor_per_expert():
    params, tensors = foreign("olmoe")
    own = params["layers_2"]["mlp"]["experts"]["in"]["kernel"]
    for e in range(3):
        name = f"model.layers.2.mlp.experts.{e}.up_proj.weight"
        np.testing.assert_array_equal(tensors[name], own[e].T)
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"here: experts of .*up_proj.* gap: 0, 2"):
        io.names.olmoe.load(tensors, where="here")


def test_too_few_experts_are_named():
    _, tensors = foreign("olmoe", num_experts=2)
    with pytest.raises(ValueError, match=r"wrong shape: .* gives \(2, 8, 12\)"):
        io.names.olmoe.load(tensors, abstract("olmoe"))


LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GPT_2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
OLMOE = {
    "model_type": "olmoe",
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("table", "config", "name"),
    [
        (io.names.llama, LLAMA, "llama-3.1-8b"),
        (io.names.qwen2, QWEN, "qwen2-0.5b"),
        (io.names.gemma2, GEMMA_2, "gemma-2-2b"),
        (io.names.gpt2, GPT_2, "gpt2"),
        (io.names.olmoe, OLMOE, "olmoe-1b-7b"),
    ],
)
def test_published_configs_give_the_models_of_the_registry(table, config, name):
    got = models.build(table.model, **table.options(config))
    assert got.clone(head_dim=got.dim_of_head) == models.build(name).clone(
        head_dim=got.dim_of_head
    )


@pytest.mark.fast
def test_windows_follow_the_layers():
    sliding = {**QWEN, "use_sliding_window": True, "sliding_window": 5}
    sliding |= {"num_hidden_layers": 4, "max_window_layers": 2}
    assert io.names.qwen2.options(sliding)["windows"] == (0, 0, 5, 5)
    kinds = ["sliding_attention", "full_attention"] * 2
    listed = {**sliding, "layer_types": kinds}
    assert io.names.qwen2.options(listed)["windows"] == (5, 0)
    all_full = {**sliding, "layer_types": ["full_attention"] * 4}
    assert io.names.qwen2.options(all_full)["windows"] == ()
    assert io.names.gemma2.options(GEMMA_2)["windows"] == (4096, 0)


@pytest.mark.fast
def test_gemma_means_the_tanh_form_where_its_first_configs_are_null():
    config = {**GEMMA_2, "model_type": "gemma", "hidden_act": "gelu"}
    for entry, want in ((None, "gelu_tanh"), ("gelu", "gelu")):
        options = io.names.gemma.options({**config, "hidden_activation": entry})
        assert options["activation"] == want
    del config["hidden_activation"]
    assert io.names.gemma.options(config)["activation"] == "gelu"


NEW_ROPE = {"rope_type": "default", "rope_theta": 7.0}


@pytest.mark.fast
def test_both_spellings_of_rotary_entries_are_read():
    config = {k: v for k, v in LLAMA.items() if not k.startswith("rope")}
    got = io.names.llama.options({**config, "rope_parameters": NEW_ROPE})
    assert (got["rotary_base"], got["rotary_scaling"]) == (7.0, None)
    linear = {"type": "linear", "factor": 2.0}
    got = io.names.llama.options({**config, "rope_theta": 9.0, "rope_scaling": linear})
    assert (got["rotary_base"], got["rotary_scaling"]) == (9.0, linear)
    assert io.names.llama.options(config)["rotary_base"] == 1e4


@pytest.mark.fast
@pytest.mark.parametrize(
    ("table", "config", "message"),
    [
        (io.names.llama, {}, "names.llama: config lacks hidden_size"),
        (io.names.llama, {**LLAMA, "model_type": "mistral"}, "model_type='mistral'"),
        (
            io.names.llama,
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type='yarn' is not supported, only 'default', 'linear', 'llama3'",
        ),
        (
            io.names.llama,
            {**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "config lacks high_freq_factor, low_freq_factor, original_max",
        ),
        (
            io.names.llama,
            {**LLAMA, "rope_scaling": {"rope_type": "linear", "long_factor": [1.0]}},
            "rotary entries long_factor are not supported",
        ),
        (
            io.names.llama,
            {**LLAMA, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is not supported",
        ),
        (
            io.names.llama,
            {**LLAMA, "quantization_config": {"bits": 4}},
            "names.llama: quantization_config is not supported",
        ),
        (io.names.qwen2, {**QWEN, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            io.names.qwen2,
            {**QWEN, "use_sliding_window": True, "layer_types": ["linear"]},
            "layer_types='linear' is not supported",
        ),
        (
            io.names.gemma2,
            {**GEMMA_2, "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 26 layers",
        ),
        (
            io.names.gemma2,
            {**GEMMA_2, "use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        (
            io.names.gpt2,
            {**GPT_2, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is not supported",
        ),
        (io.names.olmoe, {**OLMOE, "clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ],
)
def test_configs_are_read_strictly(table, config, message):
    with pytest.raises(ValueError, match=message):
        table.options(config)
