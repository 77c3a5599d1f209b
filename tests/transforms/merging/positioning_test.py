"""The search for a place in the span of task vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import merging, tree

pytestmark = pytest.mark.fast
RNG = np.random.default_rng(0)
BASE = {"a": RNG.normal(size=4).astype(np.float32), "step": np.int32(1)}
TAUS = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "step": np.zeros(3, np.int32),
}
GOAL = np.array([0.3, 0.9, 0.5]) @ TAUS["a"] + BASE["a"]


def loss_fn(params, batch):
    return jnp.mean((params["a"] - batch) ** 2)


def batches(steps=300, probes=2):
    return jnp.broadcast_to(jnp.asarray(GOAL, jnp.float32), (steps, probes, 4))


@pytest.fixture(scope="module")
def search():
    return merging.positioner(loss_fn, optax.adam(0.05))


def test_gradient_is_the_chain_rule_through_coefficients():
    """Autodiff through merged weights against kappa's Jacobian times inner products."""
    gram = tree.gram(TAUS)

    def kappa(numbers):
        return merging.slerp_chain_weights(gram, jnp.exp(numbers[:3]), scale=numbers[3])

    def loss(numbers):
        model = merging.compose(BASE, TAUS, kappa(numbers))
        return loss_fn(model, batches(1)[0, 0])

    numbers = jnp.array([0.1, -0.4, 0.3, 1.2])
    merged = np.asarray(kappa(numbers), np.float64) @ TAUS["a"] + BASE["a"]
    slope = 2 * (merged - GOAL) / 4
    want = jax.jacobian(kappa)(numbers).T @ (TAUS["a"] @ slope)
    np.testing.assert_allclose(jax.grad(loss)(numbers), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "pairwise"])
def test_finds_the_goal(search, mode):
    found = search(
        BASE, TAUS, batches(), norm_penalty=0.0, search=mode, order=(2, 0, 1)
    )
    merged = np.asarray(found.kappa) @ TAUS["a"] + BASE["a"]
    stages = {"joint": 1, "pairwise": 2}[mode]
    assert found.losses.shape == (stages, 300) and len(found.scales) == stages
    assert found.weights[0].shape == ({"joint": 3, "pairwise": 2}[mode],)
    start = found.losses[0, 0]
    # Stage by stage is greedy: the first two are placed before the third is seen.
    left = {"joint": 0.02, "pairwise": 0.15}[mode]
    assert np.mean((merged - GOAL) ** 2) < left * start
    assert (np.asarray(found.kappa) > 0).all()


def test_two_tasks_are_one_stage(search):
    two = {"a": TAUS["a"][:2], "step": TAUS["step"][:2]}
    joint = search(BASE, two, batches(20))
    pairwise = search(BASE, two, batches(20), search="pairwise")
    np.testing.assert_allclose(joint.kappa, pairwise.kappa, rtol=1e-4)


def test_a_larger_penalty_shortens(search):
    scales = [
        float(search(BASE, TAUS, batches(), norm_penalty=penalty).scales[0])
        for penalty in (0.0, 0.05, 0.2)
    ]
    assert scales[0] > scales[1] + 1e-3 > scales[2] + 2e-3


def test_losses_are_means_over_probe_tasks(search):
    uneven = jnp.stack([batches()[:1, 0], jnp.zeros((1, 4))], 1)
    found = search(BASE, TAUS, uneven).losses
    gram = np.asarray(tree.gram(TAUS))
    start = np.asarray(merging.slerp_chain_weights(gram)) @ TAUS["a"] + BASE["a"]
    want = (np.mean((start - GOAL) ** 2) + np.mean(start**2)) / 2
    np.testing.assert_allclose(found, [[want]], rtol=1e-5)


def test_any_rule_of_weights():
    def average(gram, weights):
        del gram
        return weights / weights.sum()

    run = merging.positioner(loss_fn, optax.adam(0.05), rule=average)
    found = run(BASE, TAUS, batches(), norm_penalty=0.0)
    merged = np.asarray(found.kappa) @ TAUS["a"] + BASE["a"]
    assert np.mean((merged - GOAL) ** 2) < 0.02 * found.losses[0, 0]


def test_what_is_refused(search):
    with pytest.raises(ValueError, match="search is 'greedy', wanted one of"):
        search(BASE, TAUS, batches(1), search="greedy")
    with pytest.raises(ValueError, match=r"positioner: order is \(0, 1\)"):
        search(BASE, TAUS, batches(1), order=(0, 1))
