import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax import models, tree
from mtl_jax.models.backbones import decoder
from mtl_jax.models.backbones.decoder_sizes import DECODERS

IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 0, 0, 0]], np.int32)
SIZES = {
    "vocab_size": 13,
    "width": 8,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 12,
    "max_positions": 16,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"qk_norm": "head", "tied": False, "qkv_bias": True, "head_dim": 6},
    "gemma2": {
        "norm_unit_offset": True,
        "post_norms": True,
        "activation": "gelu_tanh",
        "scale_embeddings": True,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "windows": (3, 0),
    },
    "gpt2": {
        "norm": "layer",
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "num_kv_heads": None,
    },
    "olmoe": {
        "qk_norm": "projection",
        "num_experts": 4,
        "experts_per_token": 2,
        "tied": False,
    },
}
# Published sizes, with the head of tied models counted once.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "olmoe-1b-7b": 6_919_161_856,
}


def tiny(family="llama", **options):
    return models.Decoder(**{**SIZES, **FAMILIES[family], **options})


def run(module, params, *inputs, **options):
    apply = functools.partial(module.apply, **options)
    return jax.jit(apply)({"params": params}, *inputs)


def oracle(params, ids, base=1e5, eps=1e-5):
    """Llama in float64, token by token and head by head, one row at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale["scale"]

    def turn(x, position):
        rates = base ** -(np.arange(0, 2, 2) / 2)
        turned = (x[:1] + 1j * x[1:]) * np.exp(1j * position * rates)
        return np.concatenate([turned.real, turned.imag])

    out = []
    for row in ids:
        x = p["embeddings"]["word"]["embedding"][row]
        for i in range(2):
            layer = p[f"layers_{i}"]
            a, m = layer["attention"], layer["mlp"]
            y = norm(x, layer["norm_attention"])
            q, k, v = (y @ a[n]["kernel"] for n in ("query", "key", "value"))
            heads = np.zeros((len(row), 8))
            for h in range(4):
                own, shared = slice(2 * h, 2 * h + 2), slice(h // 2 * 2, h // 2 * 2 + 2)
                keys = [turn(k[j, shared], j) for j in range(len(row))]
                for t in range(len(row)):
                    logits = np.array(keys[: t + 1]) @ turn(q[t, own], t) / np.sqrt(2)
                    w = np.exp(logits - logits.max())
                    heads[t, own] = w / w.sum() @ v[: t + 1, shared]
            x = x + heads @ a["out"]["kernel"]
            y = norm(x, layer["norm_mlp"])
            gate = y @ m["gate"]["kernel"]
            hidden = gate / (1 + np.exp(-gate)) * (y @ m["in"]["kernel"])
            x = x + hidden @ m["out"]["kernel"]
        x = norm(x, p["norm"])
        out.append(x @ p["embeddings"]["word"]["embedding"].T)
    return np.stack(out)


def test_llama_is_the_paper_in_float64(fill):
    params = fill(tiny(), IDS)
    got = run(tiny(), params, IDS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(params, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [False, True])
def test_packing_does_not_leak(fill, family, scan):
    """Segments of one row are rows of their own, with positions from 0."""
    params = fill(tiny(family), IDS)
    params = models.stack_layers(params) if scan else params
    module = tiny(family, scan=scan)
    packed = run(module, params, IDS, SEGMENTS)
    places = [(b, SEGMENTS[b] == number) for b in range(2) for number in (1, 2)]
    rows = np.zeros((4, 7), np.int32)
    for n, (b, own) in enumerate(places):
        rows[n, : own.sum()] = IDS[b, own]
    alone = run(module, params, rows)
    for n, (b, own) in enumerate(places):
        want = alone[n, : own.sum()]
        np.testing.assert_allclose(packed[b, own], want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("remat", [True, "products"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scan_and_remat_change_no_number(fill, family, remat):
    params = fill(tiny(family), IDS)

    def loss(module, p):
        return jnp.mean(jnp.sin(module.apply({"params": p}, IDS, SEGMENTS)))

    def both(module, p):
        return jax.jit(jax.value_and_grad(functools.partial(loss, module)))(p)

    want, want_grad = both(tiny(family), params)
    got, grad = both(tiny(family, scan=True, remat=remat), models.stack_layers(params))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        models.unstack_layers(grad),
        want_grad,
    )


def test_remat_and_scan_are_in_the_program(fill):
    params = models.stack_layers(fill(tiny(), IDS))

    def text(**options):
        module = tiny(scan=True, **options)
        return str(
            jax.make_jaxpr(
                jax.grad(lambda p: jnp.sum(module.apply({"params": p}, IDS)))
            )(params)
        )

    assert "scan[" in text()
    assert "remat" not in text()
    assert text(remat="none") == text()
    assert "remat" in text(remat=True)
    assert text(remat="full").count("remat") == text(remat=True).count("remat")


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_compute_keeps_float32_params_and_logits(fill, family):
    params = fill(tiny(family), IDS)
    module = tiny(family, dtype=jnp.bfloat16)
    got = run(module, params, IDS)
    assert got.dtype == jnp.float32
    hidden = functools.partial(module.apply, head=False)
    assert jax.eval_shape(hidden, {"params": params}, IDS).dtype == jnp.bfloat16
    kinds = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert {x.dtype for x in jax.tree.leaves(kinds)} == {jnp.dtype(jnp.float32)}
    want = np.asarray(run(tiny(family), params, IDS))
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean() + 0.05


def test_parts_of_the_output_can_be_asked_for(fill):
    params = fill(tiny(), IDS)
    logits = run(tiny(), params, IDS)
    places = np.array([[6, 0], [3, 3]], np.int32)
    got = run(tiny(), params, IDS, logits_at=places)
    want = np.take_along_axis(np.asarray(logits), places[:, :, None], 1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    hidden = run(tiny(), params, IDS, head=False)
    table = params["embeddings"]["word"]["embedding"]
    np.testing.assert_allclose(hidden @ table.T, logits, atol=1e-4)
    for scan in (False, True):
        own = models.stack_layers(params) if scan else params
        states = run(tiny(scan=scan), own, IDS, return_hidden=True)
        assert [x.shape for x in states] == [(2, 7, 8)] * 3
        np.testing.assert_array_equal(states[0], np.asarray(table)[IDS])


@pytest.mark.parametrize("attention", ["blocked", "fused"])
def test_attentions_agree(fill, attention):
    params = fill(tiny(windows=(3, 0)), IDS)
    want = run(tiny(windows=(3, 0)), params, IDS, SEGMENTS)
    got = run(tiny(windows=(3, 0), attention=attention), params, IDS, SEGMENTS)
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_heads_are_captured_and_replaced_by_name(fill, scan):
    params = fill(tiny(), IDS)
    params = models.stack_layers(params) if scan else params
    module = tiny(scan=scan)
    _, kept = jax.jit(
        lambda p: module.apply(
            {"params": p}, IDS, capture_intermediates=lambda m, _: m.name == "heads"
        )
    )(params)
    kept = kept["intermediates"]

    def heads_of(layer):
        if scan:
            return kept["layers"]["attention"]["heads"]["__call__"][0][layer]
        return kept[f"layers_{layer}"]["attention"]["heads"]["__call__"][0]

    assert heads_of(0).shape == (2, 7, 4, 2)

    def edit(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == "heads":
            gain = context.module.get_variable("edits", "gain")
            out = out * gain[None, None, :, None]
        return out

    @jax.jit
    def edited(gains):
        if scan:
            places = {"layers": {"attention": {"heads": {"gain": gains}}}}
        else:
            places = {
                f"layers_{i}": {"attention": {"heads": {"gain": gains[i]}}}
                for i in range(2)
            }
        with nn.intercept_methods(edit):
            return module.apply({"params": params, "edits": places}, IDS)

    gains = jnp.ones((2, 4))
    plain = run(module, params, IDS)
    np.testing.assert_allclose(edited(gains), plain, atol=1e-5)
    # Head 2 of layer 1 off is its rows of the output kernel at zero.
    got = edited(gains.at[1, 2].set(0))
    flat = params if not scan else models.unstack_layers(params)
    flat = jax.tree.map(lambda x: x, flat)
    kernel = flat["layers_1"]["attention"]["out"]["kernel"]
    flat["layers_1"]["attention"]["out"]["kernel"] = kernel.at[4:6].set(0)
    np.testing.assert_allclose(got, run(tiny(), flat, IDS), atol=1e-5)
    assert not np.allclose(got, plain)


def test_dense_layers_take_low_rank_leaves_by_interception(fill):
    """What adapters do: leaves beside the kernel, read by name, under scan too."""
    params = models.stack_layers(fill(tiny(), IDS))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8, 2)), 0.1 * rng.normal(size=(2, 2, 8))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    module = tiny(scan=True)

    def adapt(call, args, kwargs, context):
        out = call(*args, **kwargs)
        own = context.module
        if isinstance(own, nn.Dense) and own.has_variable("params", "lora_a"):
            low = args[0] @ own.get_variable("params", "lora_a")
            out = out + low @ own.get_variable("params", "lora_b")
        return out

    def with_query(**more):
        out = jax.tree.map(lambda x: x, params)
        out["layers"]["attention"]["query"].update(more)
        return out

    @jax.jit
    def adapted(p):
        with nn.intercept_methods(adapt):
            return module.apply({"params": p}, IDS)

    got = adapted(with_query(lora_a=a, lora_b=b))
    kernel = params["layers"]["attention"]["query"]["kernel"]
    want = run(module, with_query(kernel=kernel + a @ b), IDS)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert not np.allclose(got, run(module, params, IDS))


@pytest.mark.parametrize("scan", [False, True])
def test_prefix_is_what_earlier_tokens_leave(fill, scan):
    """Without rotation, keys and values of a prompt are a prefix of what follows."""
    module = tiny("gpt2", scan=scan)
    params = fill(tiny("gpt2"), IDS)
    params = models.stack_layers(params) if scan else params
    want = run(module, params, IDS)[:, 3:]
    cache = models.init_cache(module, 2, 3)
    _, cache = run(module, params, IDS[:, :3], cache=cache)
    if scan:
        prefix = cache["layers"]
    else:
        prefix = jax.tree.map(
            lambda *x: jnp.stack(x), cache["layers_0"], cache["layers_1"]
        )
    positions = np.broadcast_to(np.arange(3, 7, dtype=np.int32), (2, 4))
    got = run(module, params, IDS[:, 3:], None, positions, prefix=prefix)
    np.testing.assert_allclose(got, want, atol=1e-4)
    first = jax.tree.map(lambda x: x[:, 0], prefix)  # One prefix for all rows.
    shared = run(module, params, IDS[:, 3:], None, positions, prefix=first)
    np.testing.assert_allclose(shared[0], want[0], atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_routing_is_seen_and_overridden_layer_by_layer(fill, scan):
    params = fill(tiny("olmoe"), IDS)
    params = models.stack_layers(params) if scan else params
    module = tiny("olmoe", scan=scan)
    logits, kept = run(module, params, IDS, mutable=["intermediates"])
    kept = kept["intermediates"]
    if scan:
        (probs,) = kept["layers"]["mlp"]["router_probabilities"]
    else:
        probs = jnp.stack(
            [kept[f"layers_{i}"]["mlp"]["router_probabilities"][0] for i in range(2)]
        )
    assert probs.shape == (2, 2, 7, 4)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    own = run(module, params, IDS, routing_override=probs)
    np.testing.assert_allclose(own, logits, atol=1e-4)
    late = jnp.zeros_like(probs).at[1, :, -1].set(jnp.array([0.7, 0.0, 0.0, 0.3]))
    got = run(module, params, IDS, routing_override=late)
    np.testing.assert_allclose(got[:, :-1], logits[:, :-1], atol=1e-4)
    assert not np.allclose(got[:, -1], logits[:, -1])


def rule_of(path, leaf, rules):
    found = next((rule for rule in rules if re.search(rule[0], path)), None)
    assert found is not None, path
    assert len(found[1]) <= leaf.ndim, path
    return found


def place(mesh, params, rules):
    return tree.map_with_path(
        lambda path, x: NamedSharding(mesh, rule_of(path, x, rules)[1]), params
    )


def test_rules_cover_every_leaf_and_each_is_used():
    rules = decoder.SHARDING_RULES
    used = set()
    for family in FAMILIES:
        for scan in (False, True):
            module = tiny(family, scan=scan)
            params = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
            tree.map_with_path(
                lambda path, x: used.add(rule_of(path, x, rules)[0]), params
            )
    biases = {regex for regex, _ in rules if "mlp/gate/bias" in regex}
    assert used == {regex for regex, _ in rules} - biases
    cache = models.init_cache(tiny(scan=True), 2, 4), models.init_cache(tiny(), 2, 4)
    found = [
        tree.map_with_path(
            lambda path, x: rule_of(path, x, decoder.CACHE_RULES)[0], part
        )
        for part in cache
    ]
    assert set(jax.tree.leaves(found)) == {regex for regex, _ in decoder.CACHE_RULES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scan"),
    [("llama", True), ("gpt2", False), ("olmoe", False), ("olmoe-expert", True)],
)
def test_sharded_equals_unsharded(fill, family, scan):
    family, _, expert = family.partition("-")
    module = tiny(family, vocab_size=16, scan=scan)
    ids = jax.random.randint(jax.random.key(1), (8, 6), 0, 16)
    params = fill(module, ids)

    def loss(p, ids):
        return jnp.mean(jnp.square(module.apply({"params": p}, ids)))

    want, want_grad = jax.jit(jax.value_and_grad(loss))(params, ids)
    shape, names = ((4, 2), ("data", "model"))
    if expert:
        shape, names = ((2, 2, 2), ("data", "model", "expert"))
    devices = np.array(jax.devices()[:8]).reshape(shape)
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    rules = decoder.EXPERT_SHARDING_RULES if expert else models.sharding_rules(module)
    shardings = place(mesh, params, rules)
    batch = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got, grad = step(jax.device_put(params, shardings), batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        grad,
        want_grad,
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_are_those_published(name):
    module = models.build(name, scan=True)
    params = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    assert tree.size(params) == PUBLISHED[name]


@pytest.mark.fast
def test_every_published_name_has_a_size():
    assert set(DECODERS) == {"decoder", *PUBLISHED}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "inputs", "more", "message"),
    [
        ({}, (IDS[0],), {}, r"input_ids must be \[B, L\]"),
        ({}, (IDS, SEGMENTS[:1]), {}, r"segment_ids is \(1, 7\)"),
        ({}, (IDS, None, SEGMENTS[:, :2]), {}, r"positions is \(2, 2\)"),
        ({}, (np.zeros((1, 17), np.int32),), {}, "at most 16 positions, found 17"),
        ({"norm": "batch"}, (IDS,), {}, "norm must be one of"),
        ({"position": "alibi"}, (IDS,), {}, "position must be one of"),
        ({"qk_norm": "layer"}, (IDS,), {}, "qk_norm must be one of"),
        ({"attention": "flash"}, (IDS,), {}, "attention must be one of"),
        ({"num_kv_heads": 3}, (IDS,), {}, "must divide num_heads, found 3 and 4"),
        (
            {"attention": "fused", "attention_softcap": 1.0},
            (IDS,),
            {},
            "fused attention has no attention_softcap",
        ),
        ({}, (IDS,), {"prefix": {"key": IDS}}, "prefix wants key and value, has"),
        (
            {},
            (IDS,),
            {"prefix": {k: np.zeros((3, 5, 2, 2)) for k in ("key", "value")}},
            r"prefix key is \(3, 5, 2, 2\), wanted \(2, 5, 2, 2\)",
        ),
        (
            {},
            (IDS,),
            {"routing_override": np.zeros((2, 2, 7, 4))},
            r"routing_override is \(2, 2, 7, 4\), wanted \(2, 2, 7, 0\)",
        ),
    ],
)
def test_misuse_is_refused_by_name(options, inputs, more, message):
    module = tiny(**options)
    with pytest.raises(ValueError, match=f"Decoder: .*{message}"):
        jax.eval_shape(
            functools.partial(module.init, **more), jax.random.key(0), *inputs
        )
