"""Loads of SMILE's experts: means of gates, in plain and scanned layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, models, routing

T = 3


def taus_of(base, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(T, *p.shape)), p.dtype), base
    )


@pytest.mark.parametrize("top_k", [None, 1])
def test_means_of_gates_over_what_routed_layers_hand_on(top_k):
    mlp = models.Mlp(features=(4, 3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 5)), jnp.float32)
    base = mlp.init(jax.random.key(0), x)["params"]
    experts = routing.smile_experts(taus_of(base), rank=9, gate_rank=2)
    got = jax.jit(lambda x: models.smile_loads(mlp, base, experts, x, top_k=top_k))(x)
    assert set(got["layers_0"]) == {"kernel", "bias"}
    k = top_k or T
    first = routing.smile_gates(x, experts["layers_0"]["gate"], top_k=k).mean(0)
    np.testing.assert_allclose(got["layers_0"]["kernel"], first, atol=1e-6)
    np.testing.assert_allclose(got["layers_1"]["bias"].sum(), 1, rtol=1e-6)
    short = models.Mlp(features=(4,))
    below = {"layers_0": base["layers_0"]}
    lower = {"layers_0": experts["layers_0"]}
    middle = models.apply_smile(short, below, lower, x, top_k=k)
    last = routing.smile_gates(
        jax.nn.relu(middle), experts["layers_1"]["gate"], top_k=k
    )
    np.testing.assert_allclose(got["layers_1"]["kernel"], last.mean(0), atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_masked_tokens_do_not_count(scan, fill):
    bert = models.Bert(
        vocab_size=13,
        width=8,
        depth=2,
        num_heads=2,
        mlp_dim=10,
        max_positions=8,
        scan=scan,
    )
    ids = jnp.array([[3, 1, 4, 1], [5, 9, 2, 0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    base = fill(bert, ids)
    kernels = lambda name, shape: name.endswith("kernel")  # noqa: E731
    taus = taus_of(base)
    experts = routing.smile_experts(taus, rank=8, gate_rank=1, matrices=kernels)
    load = jax.jit(
        lambda ids: models.smile_loads(bert, base, experts, ids, mask, mask=mask)
    )
    got = load(ids)
    other = load(ids.at[1, 3].set(7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, other)
    for leaf in jax.tree.leaves(got):
        np.testing.assert_allclose(leaf.sum(-1), 1, rtol=1e-5)
    shape = (2, T) if scan else (T,)
    part = got["layers"] if scan else got["layers_0"]
    assert jax.tree.leaves(part)[0].shape == shape
    merged = merging.ada_svd(taus, got)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    with pytest.raises(ValueError, match="smile_loads: there are no experts"):
        models.smile_loads(bert, base, {}, ids, mask)
    with pytest.raises(ValueError, match="smile_loads: inputs of .* the mask is"):
        models.smile_loads(bert, base, experts, ids, mask, mask=mask[:1])
