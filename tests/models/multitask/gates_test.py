import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import multitask
from mtl_jax.models.multitask import gates

OUTPUTS = {"a": 2, "b": 1}


def dense(width):
    return lambda: models.Mlp((width,), activation="tanh", activate_final=True)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 4))


def test_mmoe_mixes_experts_by_each_tasks_gate(x, fill):
    module = multitask.MMoE(OUTPUTS, expert=dense(3), num_experts=3)
    params = fill(module, x)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = np.asarray(x, np.float64)
    layers = [p[f"experts_{e}"]["layers_0"] for e in range(3)]
    experts = [np.tanh(rows @ layer["kernel"] + layer["bias"]) for layer in layers]
    found = module.apply({"params": params}, x)
    for name in OUTPUTS:
        logits = rows @ p[f"gates_{name}"]["logits"]["kernel"]
        gate = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        h = sum(gate[:, e : e + 1] * experts[e] for e in range(3))
        head = p[f"heads_{name}"]["output"]
        want = h @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)


def test_mmoe_with_one_expert_is_hard_sharing(x, fill):
    module = multitask.MMoE(OUTPUTS, expert=dense(3), num_experts=1)
    params = fill(module, x)
    shared = {name: params[name] for name in params if name.startswith("heads_")}
    shared["encoder"] = params["experts_0"]
    hard = multitask.HardSharing(OUTPUTS, backbone=dense(3))
    want = hard.apply({"params": shared}, x)
    found = module.apply({"params": params}, x)
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.fast
def test_mmoe_needs_a_stem_for_several_inputs(x):
    module = multitask.MMoE(OUTPUTS, expert=dense(3))
    with pytest.raises(ValueError, match="MMoE: 2 inputs and options .* need a stem"):
        jax.eval_shape(module.init, jax.random.key(0), x, x)
    with pytest.raises(ValueError, match="MMoE: num_experts wants at least 1, found 0"):
        bad = multitask.MMoE(OUTPUTS, expert=dense(3), num_experts=0)
        jax.eval_shape(bad.init, jax.random.key(0), x)


@pytest.mark.fast
@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_smooth_step_is_flat_outside_and_smooth_at_the_ends(gamma):
    t = jnp.linspace(-gamma, gamma, 33)
    s = np.asarray(gates.smooth_step(t, gamma))
    np.testing.assert_array_equal(s[t <= -gamma / 2], 0)
    np.testing.assert_allclose(s[t >= gamma / 2], 1, atol=1e-6)
    assert np.all(np.diff(s) >= -1e-6)
    np.testing.assert_allclose(s + s[::-1], 1, atol=1e-6)
    slope = jax.vmap(jax.grad(lambda v: gates.smooth_step(v, gamma)))
    np.testing.assert_allclose(slope(jnp.array([-0.499, 0.499]) * gamma), 0, atol=0.05)
    np.testing.assert_allclose(slope(jnp.zeros(1)), 1.5 / gamma, rtol=1e-5)
    with pytest.raises(ValueError, match="gamma wants a positive number"):
        gates.smooth_step(t, 0.0)


@pytest.mark.fast
@hypothesis.given(st.integers(0, 1000), st.integers(1, 3))
def test_codes_weigh_every_choice_once(seed, bits):
    soft = np.random.default_rng(seed).uniform(size=(2, bits))
    found = gates.code_weights(jnp.asarray(soft, jnp.float32), 2**bits)
    want = np.ones((2, 2**bits))
    for choice in range(2**bits):
        for j in range(bits):
            b = soft[:, j]
            want[:, choice] *= b if choice >> j & 1 else 1 - b
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("per_example", [False, True])
def test_sparse_gates_sum_to_one_and_become_sparse(per_example, x):
    gate = gates.SparseGate(8, k=2, per_example=per_example)
    params = gate.init(jax.random.key(0), x)["params"]
    found, state = gate.apply({"params": params}, x, mutable=["losses"])
    assert found.shape == (5, 8) and np.all(found > 0)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    # Near-uniform codes: the entropy of two selectors over eight choices.
    (entropy,) = state["losses"]["selector_entropy"]
    np.testing.assert_allclose(entropy, 2 * np.log(8), rtol=1e-2)
    assert "selector_outside" not in state["losses"]

    decided = jax.tree.map(lambda leaf: 1e4 * jnp.sign(leaf), params)
    if per_example:
        decided["logits"] = params["logits"]
    found, state = gate.apply({"params": decided}, x, mutable=["losses"])
    assert np.all((np.asarray(found) > 0).sum(1) <= 2)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(state["losses"]["selector_entropy"][0], 0, atol=1e-5)


def test_weight_outside_the_choices_is_penalised(x):
    gate = gates.SparseGate(3, k=1)
    params = {"codes": jnp.zeros(2), "logits": jnp.zeros(1)}
    found, state = gate.apply({"params": params}, x, mutable=["losses"])
    np.testing.assert_allclose(found.sum(1), 0.75, rtol=1e-6)
    np.testing.assert_allclose(state["losses"]["selector_outside"][0], 1 / 0.75, 1e-6)

    def penalty(params):
        state = gate.apply({"params": params}, x, mutable=["losses"])[1]
        return state["losses"]["selector_outside"][0]

    # Down the gradient both bits move away from the code 11.
    assert np.all(jax.grad(penalty)(params)["codes"] > 0)


def test_a_single_choice_is_always_made(x):
    gate = gates.SparseGate(1, k=2)
    found, variables = gate.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(found, np.ones((len(x), 1)))
    assert not variables


def test_dselect_k_learns_to_pick_the_better_expert(x):
    """One expert fits the target; its gate ends there, exactly."""
    gate = gates.SparseGate(4, k=1)
    targets = jnp.array([3.0, 2.0, 0.0, 1.0])
    params = gate.init(jax.random.key(0), x)["params"]

    @jax.jit
    def step(params):
        def loss(params):
            weights, state = gate.apply({"params": params}, x, mutable=["losses"])
            entropy = state["losses"]["selector_entropy"][0]
            return jnp.mean(weights @ targets) + 0.01 * entropy

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    for _ in range(60):
        params = step(params)
    np.testing.assert_allclose(
        gate.apply({"params": params}, x)[0], [0, 0, 1, 0], atol=1e-5
    )
