import functools
import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mtl_jax import models, tree
from mtl_jax.models.backbones import encdec
from mtl_jax.models.backbones.encdec_sizes import ENCODER_DECODERS
from mtl_jax.transforms.adapters import lora

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 13, (2, 7)).astype(np.int32)
OUT = RNG.integers(0, 13, (2, 6)).astype(np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 0, 0, 0]], np.int32)
OUT_SEGMENTS = np.array([[1, 2, 2, 2, 0, 0], [1, 1, 1, 2, 2, 2]], np.int32)
SIZES = {
    "vocab_size": 13,
    "width": 8,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 3,
    "mlp_dim": 12,
    "relative_buckets": 6,
    "relative_distance": 5,
}
FAMILIES = {
    "t5": {"gated": False, "activation": "relu", "scale_outputs": True, "tied": True},
    "t5-v1.1": {"encoder_depth": 3},
    "bart": {
        **ENCODER_DECODERS["bart-base"],
        **SIZES,
        "head_dim": None,
        "max_positions": 16,
        "scale_embeddings": True,
    },
}
# As counted in the weights themselves; the bias of BART's logits comes on top.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-xl": 2_851_598_336,
    "t5-xxl": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "bart-base": 139_420_416 + 50265,
    "bart-large": 406_291_456 + 50265,
}


def tiny(family="t5-v1.1", **options):
    return models.EncoderDecoder(**{**SIZES, **FAMILIES[family], **options})


def stacked(params):
    return {
        **params,
        **{k: models.stack_layers(params[k]) for k in ("encoder", "decoder")},
    }


def prepared(fill, family, scan):
    params = fill(tiny(family), IDS, OUT)
    return tiny(family, scan=scan), stacked(params) if scan else params


def run(module, params, *inputs, **options):
    apply = functools.partial(module.apply, **options)
    return jax.jit(apply)({"params": params}, *inputs)


def oracle(params, ids, out):
    """T5 v1.1 in float64, token by token and head by head, one row at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale["scale"]

    def bucket(back, both):
        size, start = (3, 3 * (back < 0)) if both else (6, 0)
        far = abs(back) if both else max(back, 0)
        exact = size // 2
        if far >= exact:
            grown = np.log(far / exact) / np.log(5 / exact) * (size - exact)
            far = min(exact + int(grown + 1e-9), size - 1)
        return start + far

    def attend(a, x, memory, bias):
        q, k, v = (
            x @ a["query"]["kernel"],
            *(memory @ a[n]["kernel"] for n in ("key", "value")),
        )
        heads = np.zeros((len(x), 6))
        for h in range(2):
            own = slice(3 * h, 3 * h + 3)
            for t in range(len(x)):
                logits = np.array(
                    [q[t, own] @ k[s, own] + bias(t, s, h) for s in range(len(memory))]
                )
                w = np.exp(logits - logits.max())
                heads[t, own] = w / w.sum() @ v[:, own]
        return heads @ a["out"]["kernel"]

    def mlp(m, x):
        gate = x @ m["gate"]["kernel"]
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        gate = gate / 2 * (1 + np.tanh(inner))
        return (gate * (x @ m["in"]["kernel"])) @ m["out"]["kernel"]

    def side(name, depth, tokens, memory):
        own = p[name]
        x = p["embeddings"]["word"]["embedding"][tokens]

        def bias(t, s, h):
            if name == "decoder" and s > t:
                return -np.inf
            return own["relative"]["embedding"][bucket(t - s, name == "encoder"), h]

        for i in range(depth):
            layer = own[f"layers_{i}"]
            y = norm(x, layer["norm_attention"])
            x = x + attend(layer["attention"], y, y, bias)
            if memory is not None:
                y = norm(x, layer["norm_cross_attention"])
                x = x + attend(layer["cross_attention"], y, memory, lambda t, s, h: 0.0)
            x = x + mlp(layer["mlp"], norm(x, layer["norm_mlp"]))
        return norm(x, own["norm"])

    rows = []
    for read, written in zip(ids, out, strict=True):
        memory = side("encoder", 3, read, None)
        rows.append(side("decoder", 2, written, memory) @ p["head"]["kernel"])
    return np.stack(rows)


def test_t5_is_the_paper_in_float64(fill):
    params = fill(tiny(), IDS, OUT)
    got = run(tiny(), params, IDS, OUT)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(params, IDS, OUT), rtol=1e-4, atol=1e-4)


@functools.cache
def compiled(family):
    module = tiny(family)
    return jax.jit(lambda p, *inputs: module.apply({"params": p}, *inputs))


lengths = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@pytest.mark.parametrize("family", FAMILIES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(read=lengths, data=st.data())
def test_packing_does_not_leak(fill, family, read, data):
    """Segments of one row are rows of their own, on both sides."""
    params = fill(tiny(family), IDS, OUT)
    write = [data.draw(st.integers(1, 4)) for _ in read]
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)

    def packed(sizes):
        ids, segments = np.zeros((1, 12), np.int32), np.zeros((1, 12), np.int32)
        ids[0, : sum(sizes)] = rng.integers(0, 13, sum(sizes))
        numbers = np.arange(1, 1 + len(sizes))
        segments[0, : sum(sizes)] = np.repeat(numbers, sizes)
        return ids, segments

    sides = packed(read), packed(write)

    def alone(ids, segments):
        rows, masks = np.zeros((3, 12), np.int32), np.zeros((3, 12), np.int32)
        for n in range(len(read)):
            own = segments[0] == n + 1
            rows[n, : own.sum()] = ids[0, own]
            masks[n, : own.sum()] = 1
        return rows, masks

    (ids, segments), (out, out_segments) = sides
    got = compiled(family)(params, ids, out, segments, out_segments)
    (ids, masks), (out, out_masks) = (alone(*side) for side in sides)
    want = compiled(family)(params, ids, out, masks, out_masks)
    for n, size in enumerate(write):
        own = got[0, out_segments[0] == n + 1]
        np.testing.assert_allclose(own, want[n, :size], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_either_side_changes_nothing(fill, family):
    params = fill(tiny(family), IDS, OUT)
    want = run(tiny(family), params, IDS, OUT)
    rng = np.random.default_rng(1)
    for left in (0, 3):

        def pad(x, left=left):
            junk = rng.integers(0, 13, (2, 4)).astype(np.int32)
            ids = np.concatenate([junk[:, :left], x, junk[:, left:]], axis=1)
            real = np.zeros_like(ids)
            real[:, left : left + x.shape[1]] = 1
            return ids, real

        (ids, mask), (out, out_mask) = pad(IDS), pad(OUT)
        got = run(tiny(family), params, ids, out, mask, out_mask)
        own = np.asarray(got)[:, left : left + OUT.shape[1]]
        np.testing.assert_allclose(own, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scan_and_remat_change_no_number(fill, family):
    params = fill(tiny(family), IDS, OUT)

    def loss(module, p):
        out = module.apply({"params": p}, IDS, OUT, SEGMENTS, OUT_SEGMENTS)
        return jnp.mean(jnp.sin(out))

    def both(module, p):
        return jax.jit(jax.value_and_grad(functools.partial(loss, module)))(p)

    want, want_grad = both(tiny(family), params)
    got, grad = both(tiny(family, scan=True, remat=True), stacked(params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3),
        grad,
        stacked(want_grad),
    )


@pytest.mark.parametrize("attention", ["blocked", "fused"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_attentions_agree(fill, attention, family):
    params = fill(tiny(family), IDS, OUT)
    inputs = IDS, OUT, SEGMENTS, OUT_SEGMENTS
    want = run(tiny(family), params, *inputs)
    got = run(tiny(family, attention=attention), params, *inputs)
    real = OUT_SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_compute_keeps_float32_params_and_logits(fill, family):
    params = fill(tiny(family), IDS, OUT)
    module = tiny(family, dtype=jnp.bfloat16)
    got = run(module, params, IDS, OUT)
    assert got.dtype == jnp.float32
    hidden = functools.partial(module.apply, head=False)
    assert jax.eval_shape(hidden, {"params": params}, IDS, OUT).dtype == jnp.bfloat16
    kinds = jax.eval_shape(module.init, jax.random.key(0), IDS, OUT)
    assert {x.dtype for x in jax.tree.leaves(kinds)} == {jnp.dtype(jnp.float32)}
    want = np.asarray(run(tiny(family), params, IDS, OUT))
    assert np.abs(got - want).mean() < 0.1 * np.abs(want).mean() + 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [False, True])
def test_parts_of_the_output_can_be_asked_for(fill, family, scan):
    module, params = prepared(fill, family, scan)
    logits = run(module, params, IDS, OUT)
    places = np.array([[5, 0], [3, 3]], np.int32)
    got = run(module, params, IDS, OUT, logits_at=places)
    want = np.take_along_axis(np.asarray(logits), places[:, :, None], 1)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
    hidden = run(module, params, IDS, OUT, head=False)
    x, kernel = encdec.head_operands(module, params, hidden)
    np.testing.assert_allclose(x @ kernel, logits, atol=1e-4, rtol=1e-4)
    read, written = run(module, params, IDS, OUT, return_hidden=True)
    assert len(read) == 1 + module.depth_of_encoder
    assert len(written) == 1 + module.depth
    assert {x.shape for x in read} == {(2, 7, 8)}
    assert {x.shape for x in written} == {(2, 6, 8)}
    memory = run(module, params, IDS, method="encode")
    again = run(module, params, OUT, memory, method="decode")
    np.testing.assert_allclose(again, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_several_texts_read_one_memory(fill, family):
    """Kills rows that are dealt to memories in turn."""
    module, params = prepared(fill, family, True)
    out = np.random.default_rng(2).integers(0, 13, (6, 6)).astype(np.int32)
    repeated = np.repeat(IDS, 3, axis=0)
    masks = np.repeat(SEGMENTS > 0, 3, axis=0).astype(np.int32)
    want = run(module, params, repeated, out, masks)
    got = run(module, params, IDS, out, masks[::3])
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_heads_are_captured_and_edited_by_name(fill, scan):
    module, params = prepared(fill, "t5-v1.1", scan)
    seen = set()

    def edit(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.name == "heads":
            path = context.module.path
            seen.add("/".join(path))
            if "cross_attention" in path:
                return out.at[:, :, 1].set(0)
        return out

    @jax.jit
    def edited(p):
        with nn.intercept_methods(edit):
            return module.apply({"params": p}, IDS, OUT)

    got = edited(params)
    flat = params if not scan else None
    if scan:
        assert "decoder/layers/cross_attention/heads" in seen
        assert len(seen) == 3
    else:
        assert len(seen) == 3 + 2 * 2
        # Head 1 off is its rows of the output kernels at zero.
        flat = tree.map_with_path(
            lambda path, x: (
                x.at[3:].set(0) if "cross_attention/out/kernel" in path else x
            ),
            params,
        )
        np.testing.assert_allclose(got, run(module, flat, IDS, OUT), atol=1e-4)
    assert not np.allclose(got, run(module, params, IDS, OUT), atol=1e-2)


@pytest.mark.parametrize("scan", [False, True])
def test_prefixes_are_seen_by_every_query(fill, scan):
    """A prefix on one side changes that side; zeros of weight 0 would not."""
    module, params = prepared(fill, "bart", scan)
    rng = np.random.default_rng(3)
    prefix = {
        side: {
            kind: jnp.asarray(rng.normal(size=(2, 2, 3, 2, 4)), jnp.float32)
            for kind in ("key", "value")
        }
        for side in ("encoder", "decoder", "cross")
    }
    plain = run(module, params, IDS, OUT)
    for side, part in prefix.items():
        got = run(module, params, IDS, OUT, prefix={side: part})
        assert np.all(np.max(np.abs(got - plain), axis=-1) > 1e-4)
        shared = jax.tree.map(lambda x: x[:, 0], part)  # One for all rows.
        again = run(module, params, IDS, OUT, prefix={side: shared})
        np.testing.assert_allclose(again[0], got[0], atol=1e-4, rtol=1e-4)
        # So far down that nothing is left of it.
        far = {"key": 0 * part["key"], "value": 0 * part["value"]}
        silent = run(module, params, IDS, OUT, prefix={side: far})
        assert np.all(np.isfinite(silent))


@pytest.mark.parametrize("scan", [False, True])
def test_low_rank_adapters_by_path_rules(fill, scan):
    module, params = prepared(fill, "t5-v1.1", scan)
    rules = (r"cross_attention/(query|value)/kernel$", r"encoder/.*mlp/gate/kernel$")
    adapter = lora.init(jax.random.key(0), params, rules, rank=2)
    rng = np.random.default_rng(1)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), adapter
    )
    want = run(module, lora.merge(params, adapter, alpha=4.0), IDS, OUT)
    got = models.apply_adapted(module, params, adapter, IDS, OUT, alpha=4.0)
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)
    assert not np.allclose(got, run(module, params, IDS, OUT), atol=1e-2)


def rule_of(path, leaf, rules):
    found = next((rule for rule in rules if re.search(rule[0], path)), None)
    assert found is not None, path
    assert len(found[1]) <= leaf.ndim, path
    return found


def test_rules_cover_every_leaf_and_each_is_used():
    rules = encdec.SHARDING_RULES
    used = set()
    for family in (*FAMILIES, "gated-bias"):
        for scan in (False, True):
            if family == "gated-bias":
                module = tiny("bart", gated=True, scan=scan, tied=False)
            else:
                module = tiny(family, scan=scan)
            params = jax.eval_shape(module.init, jax.random.key(0), IDS, OUT)["params"]
            tree.map_with_path(
                lambda path, x: used.add(rule_of(path, x, rules)[0]), params
            )
    assert used == {regex for regex, _ in rules}
    caches = [models.init_cache(tiny(scan=s), 2, 4, memory=7) for s in (False, True)]
    found = tree.map_with_path(
        lambda path, x: rule_of(path[2:], x, encdec.CACHE_RULES)[0], caches
    )
    assert set(jax.tree.leaves(found)) == {regex for regex, _ in encdec.CACHE_RULES}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scan"), [("t5-v1.1", True), ("bart", False)])
def test_sharded_equals_unsharded(fill, family, scan):
    module = tiny(family, vocab_size=16, mlp_dim=16, scan=scan)
    ids = jax.random.randint(jax.random.key(1), (8, 6), 0, 16)
    out = jax.random.randint(jax.random.key(2), (8, 4), 0, 16)
    if family == "bart":
        module = module.clone(max_positions=6)
    params = fill(module, ids, out)

    def loss(p, ids, out):
        return jnp.mean(jnp.sin(module.apply({"params": p}, ids, out)))

    want, want_grad = jax.jit(jax.value_and_grad(loss))(params, ids, out)
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = models.sharding_rules(module)
    shardings = tree.map_with_path(
        lambda path, x: NamedSharding(mesh, rule_of(path, x, rules)[1]), params
    )
    batch = jax.device_put((ids, out), NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got, grad = step(jax.device_put(params, shardings), *batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3),
        grad,
        want_grad,
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_are_those_published(name):
    module = models.build(name, scan=True)
    params = jax.eval_shape(module.init, jax.random.key(0), IDS, OUT)["params"]
    assert tree.size(params) == PUBLISHED[name]


@pytest.mark.fast
def test_every_published_name_has_a_size():
    assert set(ENCODER_DECODERS) == {"encoder-decoder", *PUBLISHED}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "inputs", "more", "message"),
    [
        ({}, (IDS[0], OUT), {}, r"encode: input_ids must be \[B, L\]"),
        ({}, (IDS, OUT[0]), {}, r"decode: input_ids must be \[B, L\]"),
        ({}, (IDS, OUT, SEGMENTS[:1]), {}, r"encode: segment_ids is \(1, 7\)"),
        ({}, (IDS, OUT, None, SEGMENTS), {}, r"decode: segment_ids is \(2, 7\)"),
        ({}, (IDS, OUT, None, None, IDS), {}, "positions belong to position='learned'"),
        ({}, (IDS, OUT[:1]), {}, "has 1 rows, no multiple of the 2 of the memory"),
        ({"norm": "batch"}, (IDS, OUT), {}, "norm must be one of"),
        ({"position": "rotary"}, (IDS, OUT), {}, "position must be one of"),
        ({"position": "learned"}, (IDS, OUT), {}, "want max_positions"),
        ({"attention": "flash"}, (IDS, OUT), {}, "attention must be one of"),
        ({"num_kv_heads": 3}, (IDS, OUT), {}, "divide num_heads, found 3 and 2"),
        ({"relative_distance": 1}, (IDS, OUT), {}, "max_distance must exceed"),
        ({"max_positions": 6}, (IDS, OUT), {}, "at most 6 positions, found 7"),
        ({}, (IDS, OUT), {"prefix": {"self": {}}}, "prefix has self, known"),
        (
            {},
            (IDS, OUT),
            {
                "prefix": {
                    "cross": {k: np.zeros((2, 5, 2, 2)) for k in ("key", "value")}
                }
            },
            r"prefix cross key is \(2, 5, 2, 2\), wanted \(2, 5, 2, 3\)",
        ),
    ],
)
def test_faults_are_named(options, inputs, more, message):
    module = tiny(**options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **more))


@pytest.mark.fast
def test_targets_are_shifted_within_their_segments():
    targets = jnp.array([[5, 6, 7, 8, 9, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    got = models.shift_right(targets, segments, start=3)
    np.testing.assert_array_equal(got, [[3, 5, 3, 7, 8, 3]])
    np.testing.assert_array_equal(models.shift_right(targets), [[0, 5, 6, 7, 8, 9]])
    with pytest.raises(ValueError, match=r"segment_ids are \(1, 2\)"):
        models.shift_right(targets, segments[:, :2])
