"""Gossip: who meets whom, and what travels how far."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import merging


def test_neighbours():
    found = merging.neighbours(5, topology="rotate", reach=2)
    assert found.tolist() == [[t, (t + 1) % 5, (t + 2) % 5] for t in range(5)]
    found = merging.neighbours(5, reach=2)
    assert [sorted(row) for row in found.tolist()] == [list(range(5))] * 5
    with pytest.raises(ValueError, match="neighbours: reach is 1, .* found 3"):
        merging.neighbours(2)
    with pytest.raises(ValueError, match="neighbours: topology"):
        merging.neighbours(4, topology="star")


@pytest.mark.parametrize("topology", ["ring", "rotate"])
def test_averages_are_powers_of_a_mixing_matrix(topology):
    rng = np.random.default_rng(0)
    taus = {
        "a": jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=6), jnp.bfloat16),
    }
    mixing = np.zeros((6, 6))
    for t, row in enumerate(merging.neighbours(6, topology=topology).tolist()):
        mixing[t, row] = 1 / len(row)
    run = jax.jit(
        lambda taus: merging.gossip(
            taus, lambda own, t: merging.average(own), rounds=4, topology=topology
        )
    )
    got = run(taus)
    want = np.einsum("st,t...->s...", np.linalg.matrix_power(mixing, 4), taus["a"])
    np.testing.assert_allclose(got["a"], want, atol=1e-5)
    assert got["b"].dtype == jnp.bfloat16
    mean = jax.tree.map(lambda x: x.astype(jnp.float32).mean(0), taus)
    np.testing.assert_allclose(merging.average(got)["a"], mean["a"], atol=1e-5)
    far = merging.gossip(taus, lambda own, t: merging.average(own), rounds=60)
    np.testing.assert_allclose(
        far["a"], jnp.broadcast_to(mean["a"], (6, 2, 3)), atol=1e-4
    )


def test_no_rounds_changes_nothing_and_all_move_at_once():
    taus = {"w": jnp.arange(4.0)}
    merge = lambda own, t: {"w": own["w"][1]}  # noqa: E731
    assert merging.gossip(taus, merge, rounds=0)["w"].tolist() == [0, 1, 2, 3]
    got = merging.gossip(taus, merge, rounds=1, topology="rotate")
    assert got["w"].tolist() == [1, 2, 3, 0]


def test_learned_merges_know_whose_turn_it_is():
    """Each model learns coefficients of three neighbours for a goal of its own."""
    rng = np.random.default_rng(1)
    taus = {"w": jnp.asarray(rng.normal(size=(4, 30)), jnp.float32)}
    met = merging.neighbours(4)
    goals = jnp.stack([taus["w"][row].sum(0) for row in met])
    fit = merging.learner(
        lambda weights, own: merging.combine(own, weights),
        lambda params, batch, task, own: jnp.sum((params["w"] - batch) ** 2),
        optax.adam(0.05),
    )

    def merge(own, t):
        batches = jnp.broadcast_to(goals[t], (200, 1, 30))
        found = fit(jnp.full(3, 0.3), batches, args=own)
        return merging.combine(own, found.variables)

    got = merging.gossip(taus, merge, rounds=1)["w"]
    np.testing.assert_allclose(got, goals, atol=0.02)


def test_errors():
    taus = {"w": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="gossip: rounds is -1"):
        merging.gossip(taus, lambda own, t: own, rounds=-1)
    with pytest.raises(ValueError, match="gossip: 'w' is .* in what merge returns"):
        merging.gossip(taus, lambda own, t: own, rounds=1)
    with pytest.raises(ValueError, match="gossip"):
        merging.gossip({"w": jnp.full((4, 2), jnp.inf)}, lambda own, t: own, rounds=1)
