import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_jax.models.layers import MixtureOfExperts, apply_experts
from mtl_jax.models.layers.moe import ExpertKernels, _block_sizes

RNG = np.random.default_rng(0)
WIDTH, HIDDEN = 4, 6


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def kernels(experts):
    inner, outer = (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)
    return ExpertKernels(normal(*inner), normal(*inner), normal(*outer))


def oracle(x, weights, experts, banks):
    """Token by token, choice by choice, in float64."""
    gate, into, out = (np.asarray(k, np.float64) for k in banks)
    y = np.zeros(x.shape)
    for n, token in enumerate(np.asarray(x, np.float64)):
        for weight, e in zip(weights[n], experts[n], strict=True):
            g = token @ gate[e]
            y[n] += weight * ((g / (1 + np.exp(-g)) * (token @ into[e])) @ out[e])
    return y


def choices(tokens, top_k, experts, skew):
    """Distinct experts per token; with `skew` always the same."""
    rows = [
        np.arange(top_k) if skew else RNG.permutation(experts)[:top_k]
        for _ in range(tokens)
    ]
    return np.array(rows, np.int32)


CASES = [(1, 2, 8), (5, 1, 3), (16, 2, 4), (33, 3, 5), (6, 4, 4)]


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_both_formulations_are_the_loop(case, skew):
    tokens, top_k, count = case
    x, banks = normal(tokens, WIDTH), kernels(count)
    weights, experts = normal(tokens, top_k), choices(tokens, top_k, count, skew)
    want = oracle(x, weights, experts, banks)
    for implementation in ("dense", "sorted", None):
        run = functools.partial(apply_experts, implementation=implementation)
        got = jax.jit(run)(x, weights, experts, banks)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_both_formulations_have_the_same_gradients():
    tokens, top_k, count = 16, 2, 4
    x, banks = normal(tokens, WIDTH), kernels(count)
    weights, experts = normal(tokens, top_k), choices(tokens, top_k, count, False)

    def loss(implementation, x, weights, banks):
        y = apply_experts(x, weights, experts, banks, "silu", implementation)
        return jnp.sum(jnp.sin(y))

    grads = [
        jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2)))(x, weights, banks)
        for name in ("dense", "sorted")
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads
    )


@pytest.mark.fast
@given(
    st.integers(1, 12).flatmap(
        lambda e: st.tuples(
            st.just(e), st.lists(st.integers(0, e - 1), min_size=1, max_size=60)
        )
    )
)
def test_the_blocks_hold_every_assignment(case):
    """However the tokens fall; kills a count of blocks that is one too small."""
    count, flat = case
    size, blocks = _block_sizes(len(flat), count)
    used = sum(-(-flat.count(e) // size) for e in range(count))
    assert used <= blocks
    assert blocks * size <= max(2 * len(flat), 1) + size


@pytest.mark.fast
def test_none_takes_the_formulation_with_less_arithmetic():
    def dots(tokens, top_k, count):
        shapes = jax.ShapeDtypeStruct, jnp.float32
        args = (
            shapes[0]((tokens, WIDTH), jnp.float32),
            shapes[0]((tokens, top_k), jnp.float32),
            shapes[0]((tokens, top_k), jnp.int32),
            jax.eval_shape(lambda: ExpertKernels(*map(jnp.asarray, kernels(count)))),
        )
        return str(jax.make_jaxpr(apply_experts)(*args))

    assert "sort[" in dots(64, 2, 16)
    assert "sort[" not in dots(64, 2, 4)


def layer(**options):
    return MixtureOfExperts(num_experts=4, top_k=2, hidden=HIDDEN, **options)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_layer_routes_by_softmax_and_then_top_k(fill, normalize):
    module, x = layer(normalize=normalize), normal(2, 3, WIDTH)
    params = fill(module, x)
    run = jax.jit(lambda p: module.apply({"params": p}, x, mutable=["intermediates"]))
    got, sown = run(params)
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"])
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    (found,) = sown["intermediates"]["router_probabilities"]
    np.testing.assert_allclose(found, probs, atol=1e-6)
    flat = probs.reshape(-1, 4)
    experts = np.argsort(-flat, axis=-1)[:, :2]
    weights = np.take_along_axis(flat, experts, -1)
    if normalize:
        weights /= weights.sum(-1, keepdims=True)
    bank = [params["experts"][name]["kernel"] for name in ("gate", "in", "out")]
    want = oracle(x.reshape(-1, WIDTH), weights, experts, bank).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_routing_may_be_given_for_some_tokens(fill):
    module, x = layer(), normal(1, 3, WIDTH)
    params = fill(module, x)
    run = jax.jit(lambda p, o=None: module.apply({"params": p}, x, o))
    own = run(params)
    override = np.zeros((1, 3, 4), np.float32)
    np.testing.assert_array_equal(run(params, override), own)
    override[0, 1] = 0.1, 0.6, 0.0, 0.3
    got = run(params, override)
    np.testing.assert_allclose(got[:, ::2], own[:, ::2], atol=1e-6)
    bank = [params["experts"][name]["kernel"] for name in ("gate", "in", "out")]
    want = oracle(x[0, 1:2], [[0.6, 0.3]], [[1, 3]], bank)
    np.testing.assert_allclose(got[0, 1:2], want, atol=1e-4)


def test_gradients_reach_router_and_override(fill):
    module, x = layer(), normal(1, 3, WIDTH)
    params = fill(module, x)
    override = np.full((1, 3, 4), 0.25, np.float32)

    def loss(p, o):
        return jnp.sum(jnp.square(module.apply({"params": p}, x, o)))

    grad = jax.jit(jax.grad(loss))(params, None)
    assert np.abs(grad["router"]["kernel"]).max() > 0
    grad, slope = jax.jit(jax.grad(loss, (0, 1)))(params, override)
    assert np.abs(grad["router"]["kernel"]).max() == 0
    assert np.abs(slope).max() > 0


def test_bf16_compute_keeps_probabilities_in_float32(fill):
    module, x = layer(dtype=jnp.bfloat16), normal(2, 3, WIDTH)
    params = fill(layer(), x)
    got, sown = jax.jit(
        lambda p: module.apply({"params": p}, x, mutable=["intermediates"])
    )(params)
    assert got.dtype == jnp.bfloat16
    assert sown["intermediates"]["router_probabilities"][0].dtype == jnp.float32
    want = jax.jit(lambda p: layer().apply({"params": p}, x))(params)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.2)


@pytest.mark.fast
def test_other_implementations_are_refused():
    with pytest.raises(ValueError, match="implementation must be one of .*'ragged'"):
        apply_experts(
            normal(2, WIDTH),
            normal(2, 1),
            np.zeros((2, 1), int),
            kernels(2),
            "silu",
            "ragged",
        )
    assert isinstance(layer(), nn.Module)
