"""Steps of the decoder through a cache are the forward pass over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models.backbones.encdec_sizes import ENCODER_DECODERS

SIZES = {
    "vocab_size": 13,
    "width": 8,
    "depth": 2,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 12,
    "relative_buckets": 6,
    "relative_distance": 5,
}
FAMILIES = {
    "t5": {},
    "t5-blocked": {"attention": "blocked"},
    "bart": {**ENCODER_DECODERS["bart-base"], **SIZES, "max_positions": 16},
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 13, (3, 7)).astype(np.int32)
OUT = RNG.integers(0, 13, (3, 9)).astype(np.int32)
MASK = (np.arange(7) < np.array([[7], [2], [5]])).astype(np.int32)
LENGTHS = np.array([4, 1, 2])


def prepared(fill, family, scan):
    options = {**SIZES, **FAMILIES[family]}
    params = fill(models.EncoderDecoder(**options), IDS, OUT)
    if scan:
        sides = {k: models.stack_layers(params[k]) for k in ("encoder", "decoder")}
        params = {**params, **sides}
    return models.EncoderDecoder(**options, scan=scan), params


def functions(module, params):
    """Compiled (full forward pass, prefill, step)."""

    def decode(*inputs, **options):
        return module.apply({"params": params}, *inputs, method="decode", **options)

    def full(out):
        return module.apply({"params": params}, IDS, out, MASK)

    def prefill(out, segments, cache):
        memory = module.apply({"params": params}, IDS, MASK, method="encode")
        return decode(out, memory, MASK, segments, cache=cache)

    def step(token, cache):
        return decode(token, cache=cache)

    return jax.jit(full), jax.jit(prefill), jax.jit(step)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_beginnings_and_steps_are_the_full_forward(fill, family, scan):
    module, params = prepared(fill, family, scan)
    full, prefill, step = functions(module, params)
    want = full(OUT)
    segments = (np.arange(4) < LENGTHS[:, None]).astype(np.int32)
    cache = models.init_cache(module, 3, 8, memory=7)
    logits, cache = prefill(OUT[:, :4] * segments, segments, cache)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            logits[b, :length], want[b, :length], atol=2e-4, rtol=1e-4
        )
    shapes = jax.tree.map(jnp.shape, cache)
    rows = np.arange(3)
    for n in range(4):
        at = LENGTHS + n
        logits, cache = step(OUT[rows, at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], want[rows, at], atol=2e-4, rtol=1e-4)
    np.testing.assert_array_equal(cache["length"], LENGTHS + 4)
    np.testing.assert_array_equal(cache["memory_segments"], MASK)
    assert jax.tree.map(jnp.shape, cache) == shapes
    assert step._cache_size() == 1
    # Row 0 is full now.
    logits, _ = step(OUT[:, 8:], cache)
    np.testing.assert_array_equal(
        np.isnan(logits).any(axis=(1, 2)), [True, False, False]
    )


@pytest.mark.parametrize("scan", [False, True])
def test_reordered_rows_go_on_as_the_rows_they_were(fill, scan):
    module, params = prepared(fill, "t5", scan)
    _, prefill, step = functions(module, params)
    cache = models.init_cache(module, 3, 8, memory=7)
    _, cache = prefill(OUT[:, :2], np.ones((3, 2), np.int32), cache)
    rows = jnp.array([2, 0, 0])
    got, _ = step(OUT[rows, 2:3], models.reorder_cache(cache, rows))
    want, _ = step(OUT[:, 2:3], cache)
    np.testing.assert_allclose(got, want[rows], atol=1e-5, rtol=1e-5)


def test_half_precision_keys_stay_near_and_keep_their_dtype(fill):
    module, params = prepared(fill, "t5", True)
    full, prefill, step = functions(module, params)
    cache = models.init_cache(module, 3, 9, jnp.bfloat16, memory=7)
    _, cache = prefill(OUT[:, :8], np.ones((3, 8), np.int32), cache)
    logits, cache = step(OUT[:, 8:], cache)
    kinds = {x.dtype for x in jax.tree.leaves(cache["layers"])}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    want = np.asarray(full(OUT)[:, -1])
    assert np.abs(logits[:, 0] - want).mean() < 0.1 * np.abs(want).mean()


@pytest.mark.fast
def test_caches_know_whether_there_is_a_memory():
    module = models.EncoderDecoder(**SIZES)
    made = models.init_cache(module, 5, 6, memory=7)
    assert made["layers_1"]["key"].shape == (5, 6, 2, 4)
    assert made["layers_1"]["memory_value"].shape == (5, 7, 2, 4)
    assert made["memory_segments"].shape == (5, 7)
    made = models.init_cache(module.clone(scan=True), 5, 6, memory=7)
    assert made["layers"]["memory_key"].shape == (2, 5, 7, 2, 4)
    with pytest.raises(ValueError, match="memory belongs to .* is None for EncoderDec"):
        models.init_cache(module, 5, 6)
    with pytest.raises(ValueError, match="memory belongs to .* is 7 for Decoder"):
        models.init_cache(models.Decoder(), 5, 6, memory=7)
    with pytest.raises(ValueError, match=r"length must lie in \[1, inf\]"):
        models.init_cache(module, 5, 0, memory=7)


@pytest.mark.fast
def test_a_decoder_wants_something_to_read(fill):
    module, params = prepared(fill, "t5", True)
    cache = models.init_cache(module, 3, 8, memory=7)
    memory = jnp.zeros((3, 7, 8))

    def decode(*inputs, **options):
        call = {"method": "decode", **options}
        jax.eval_shape(lambda: module.apply({"params": params}, *inputs, **call))

    decode(OUT, memory, MASK, cache=cache)
    for inputs, more, message in (
        ((OUT,), {}, "wanted a memory or a cache"),
        ((OUT, None, MASK), {"cache": cache}, "memory_segment_ids with a memory only"),
        ((OUT, memory, MASK[:, 1:]), {}, r"memory_segment_ids is \(3, 6\)"),
        ((OUT, memory[:, 1:]), {"cache": cache}, r"the cache was made for \(3, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(*inputs, **more)
