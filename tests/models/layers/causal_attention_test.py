import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.models.layers import CausalSelfAttention, grouped_attend, restarts
from mtl_jax.models.layers import causal_attention as lib

RNG = np.random.default_rng(0)
BATCH, LENGTH, HEADS, SHARED, DIM = 2, 7, 6, 2, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 0, 0, 0]], np.int32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


QUERY = normal(BATCH, LENGTH, HEADS, DIM)
KEY, VALUE = normal(2, BATCH, LENGTH, SHARED, DIM)


def oracle(mask, scale, softcap=None, keys=(KEY, VALUE)):
    """Head by head in float64."""
    key, value = (np.asarray(x, np.float64) for x in keys)
    out = np.zeros(QUERY.shape)
    for b in range(BATCH):
        for h in range(HEADS):
            k = h // (HEADS // SHARED)
            logits = scale * np.asarray(QUERY[b, :, h], np.float64) @ key[b, :, k].T
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            logits = np.where(mask[b], logits, -np.inf)
            w = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, h] = w / w.sum(-1, keepdims=True) @ value[b, :, k]
    return out


def seen(window=None):
    mask = np.zeros((BATCH, LENGTH, LENGTH), bool)
    for b in range(BATCH):
        for i in range(LENGTH):
            for j in range(i + 1):
                near = not window or i - j < window
                mask[b, i, j] = SEGMENTS[b, i] == SEGMENTS[b, j] and near
    return mask


def context(**options):
    made, _ = lib.make_context((BATCH, LENGTH), SEGMENTS, None, None)
    return made._replace(**options)


@pytest.mark.fast
@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_tokens_see_their_segment_causally_through_the_window(window):
    want = seen(window)
    np.testing.assert_array_equal(lib.visible(context(), window), want)
    kept = context(mask=lib.visible(context()))
    np.testing.assert_array_equal(lib.visible(kept, window), want)
    if window is not None:
        traced = jax.jit(lambda w: lib.visible(context(), w))(window)
        np.testing.assert_array_equal(traced, want)


@pytest.mark.fast
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_grouped_heads_are_the_loop(softcap):
    got = jax.jit(functools.partial(grouped_attend, scale=0.6, softcap=softcap))(
        QUERY, KEY, VALUE, seen()
    )
    np.testing.assert_allclose(got, oracle(seen(), 0.6, softcap), atol=1e-5)


def attention(**options):
    return CausalSelfAttention(HEADS, SHARED, DIM, **options)


def run(module, params, x, shared, **options):
    return jax.jit(lambda p: module.apply({"params": p}, x, shared, **options)[0])(
        params
    )


X = normal(BATCH, LENGTH, 8)
PREFIX = {"key": normal(3, SHARED, DIM), "value": normal(3, SHARED, DIM)}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prefix", [None, PREFIX])
@pytest.mark.parametrize("implementation", ["blocked", "fused"])
def test_implementations_agree(fill, monkeypatch, implementation, prefix, window):
    monkeypatch.setattr(lib, "_BLOCK", 3)  # Two whole blocks and a part.
    params = fill(attention(), X, context())
    options = {"window": window, "prefix": prefix}
    want = run(attention(), params, X, context(), **options)
    module = attention(implementation=implementation)
    got = run(module, params, X, context(), **options)
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def test_gradients_agree_between_whole_and_blocks(fill, monkeypatch):
    monkeypatch.setattr(lib, "_BLOCK", 3)
    params = fill(attention(), X, context())

    def loss(module, p):
        y = module.apply({"params": p}, X, context(), window=3, prefix=PREFIX)[0]
        return jnp.sum(jnp.where((SEGMENTS > 0)[..., None], jnp.sin(y), 0))

    grads = [
        jax.jit(jax.grad(functools.partial(loss, module)))(params)
        for module in (attention(), attention(implementation="blocked"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *grads)


@pytest.mark.fast
def test_blocks_never_hold_all_logits(monkeypatch):
    monkeypatch.setattr(lib, "_BLOCK", 8)
    x = jnp.zeros((1, 64, 8))
    shared, _ = lib.make_context((1, 64), None, None, None)

    def text(module):
        params = jax.eval_shape(module.init, jax.random.key(0), x, shared)["params"]
        return str(
            jax.make_jaxpr(
                jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x, shared)[0]))
            )(params)
        )

    assert "f32[1,2,3,64,64]" in text(attention())
    assert "64,64]" not in text(attention(implementation="blocked"))


@pytest.mark.parametrize("per_row", [False, True])
def test_prefix_is_seen_by_all_and_not_rotated(fill, per_row):
    prefix = PREFIX
    if per_row:
        prefix = {k: np.stack([v, 2 * v]) for k, v in PREFIX.items()}
    params = fill(attention(), X, context())
    tables = (np.ones((BATCH, LENGTH, 2)), np.zeros((BATCH, LENGTH, 2)))
    still = context(rotary=tuple(np.float32(t) for t in tables))
    got = run(attention(), params, X, still, window=2, prefix=prefix)

    def project(name, heads):
        return (X @ np.asarray(params[name]["kernel"])).reshape(2, LENGTH, heads, DIM)

    rows = [{k: v[b] if per_row else v for k, v in prefix.items()} for b in range(2)]
    key, value = (
        np.concatenate([np.stack([r[n] for r in rows]), project(n, SHARED)], axis=1)
        for n in ("key", "value")
    )
    mask = np.concatenate([np.ones((2, LENGTH, 3), bool), seen(2)], axis=-1)
    heads = grouped_attend(project("query", HEADS), key, value, mask, scale=DIM**-0.5)
    want = np.asarray(heads).reshape(2, LENGTH, -1) @ params["out"]["kernel"]
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-4)


@pytest.mark.fast
def test_positions_restart_with_every_segment():
    want = [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 2]]
    np.testing.assert_array_equal(restarts(SEGMENTS), want)


def test_projections_are_dense_with_two_axes(fill):
    module = attention(qkv_bias=True, qk_norm="projection")
    params = fill(module, X, context())
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes["query"] == {"kernel": (8, 24), "bias": (24,)}
    assert shapes["key"] == shapes["value"] == {"kernel": (8, 8), "bias": (8,)}
    assert shapes["out"] == {"kernel": (24, 8)}
    assert shapes["norm_query"] == {"scale": (24,)}
    assert shapes["norm_key"] == {"scale": (8,)}
    by_head = fill(attention(qk_norm="head"), X, context())
    assert by_head["norm_key"]["scale"].shape == (DIM,)
