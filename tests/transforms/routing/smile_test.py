"""SMILE: experts of full rank are the experts, gates are norms in their subspaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import routing

pytestmark = pytest.mark.fast
T, IN, OUT = 3, 6, 4


def draw(seed, *lead):
    rng = np.random.default_rng(seed)

    def part(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"dense": {"kernel": part(T, *lead, IN, OUT), "bias": part(T, *lead, OUT)}}


def tokens(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(*shape, IN)), jnp.float32)


def test_full_rank_with_one_task_is_the_expert():
    taus = jax.tree.map(lambda x: x[:1], draw(0))
    layer = routing.smile_experts(taus, rank=9, gate_rank=2)["dense"]
    x = tokens(1, 2, 5)
    got = routing.smile_dense(x, layer)
    want = np.asarray(x) @ np.asarray(taus["dense"]["kernel"][0])
    want += np.asarray(taus["dense"]["bias"][0])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_right_route_is_the_expert_of_its_task():
    """Tasks that live in coordinates of their own."""
    rng = np.random.default_rng(2)
    kernel = np.zeros((T, IN, OUT))
    for t in range(T):
        kernel[t, 2 * t : 2 * t + 2] = rng.normal(size=(2, OUT))
    taus = {"dense": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    layer = routing.smile_experts(taus, rank=2, gate_rank=2)["dense"]
    x = jnp.eye(IN)
    gates = routing.smile_gates(x, layer["gate"])
    np.testing.assert_array_equal(gates, np.repeat(np.eye(T), 2, axis=0))
    want = np.einsum("bi,bio->bo", np.eye(IN), kernel[np.repeat(np.arange(T), 2)])
    np.testing.assert_allclose(routing.smile_dense(x, layer), want, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gates_and_outputs_against_loops(top_k):
    taus = draw(3)
    layer = routing.smile_experts(taus, rank=2, gate_rank=1)["dense"]
    x = tokens(4, 7)
    got = routing.smile_dense(x, layer, top_k=top_k)
    gates = routing.smile_gates(x, layer["gate"], top_k=top_k)
    kernels = np.asarray(taus["dense"]["kernel"], np.float64)
    parts = [np.linalg.svd(k, full_matrices=False) for k in kernels]
    for b, row in enumerate(np.asarray(x, np.float64)):
        logits = np.array([np.linalg.norm(u[:, :1].T @ row) for u, _, _ in parts])
        weights = np.exp(logits) / np.exp(logits).sum()
        weights[np.argsort(-weights)[top_k:]] = 0
        weights /= weights.sum()
        np.testing.assert_allclose(gates[b], weights, atol=1e-4)
        want = sum(
            w * (row @ (u[:, :2] * s[:2]) @ vt[:2] + np.asarray(bias))
            for w, (u, s, vt), bias in zip(
                weights, parts, taus["dense"]["bias"], strict=True
            )
        )
        np.testing.assert_allclose(got[b], want, atol=1e-4)


def test_signs_of_singular_vectors_do_not_matter():
    layer = routing.smile_experts(draw(5), rank=2, gate_rank=2)["dense"]
    x = tokens(6, 3)
    turned = {**layer, "gate": -layer["gate"]}
    for part in (layer, turned):
        np.testing.assert_allclose(
            routing.smile_dense(x, part), routing.smile_dense(x, layer), atol=1e-6
        )


def test_stacked_layers_keep_their_axis_in_front():
    taus = draw(7, 2)
    found = routing.smile_experts(
        taus, rank=2, gate_rank=1, matrices=lambda name, _: name.endswith("kernel")
    )["dense"]
    assert found["a"].shape == (2, T, IN, 2) and found["bias"].shape == (2, T, OUT)
    own = jax.tree.map(lambda x: x[:, 1], taus)
    alone = routing.smile_experts(own, rank=2, gate_rank=1)["dense"]
    x = tokens(8, 3)
    second = jax.tree.map(lambda p: p[1], found)
    np.testing.assert_allclose(
        routing.smile_dense(x, second), routing.smile_dense(x, alone), atol=1e-5
    )


def test_tasks_that_changed_nothing_add_nothing_and_have_slopes():
    taus = jax.tree.map(jnp.zeros_like, draw(9))
    layer = routing.smile_experts(taus, rank=2, gate_rank=1)["dense"]
    x = tokens(10, 2)
    assert not routing.smile_dense(x, layer, top_k=2).any()
    slope = jax.grad(lambda x: routing.smile_dense(x, layer, top_k=T).sum())(x)
    assert jnp.isfinite(slope).all()


def test_refuses_by_name():
    taus = draw(11)
    with pytest.raises(ValueError, match="smile_experts: rank is 0, gate_rank 1"):
        routing.smile_experts(taus, rank=0, gate_rank=1)
    with pytest.raises(ValueError, match="smile_experts: no leaf of taus is a kernel"):
        routing.smile_experts({"w": taus["dense"]["kernel"]}, rank=1, gate_rank=1)
    layer = routing.smile_experts(taus, rank=1, gate_rank=1)["dense"]
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"smile_gates: top_k is {top_k}"):
            routing.smile_gates(tokens(12, 2), layer["gate"], top_k=top_k)
