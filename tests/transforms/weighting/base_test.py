"""What every weighting owes: a formula, a domain, and a place in a train step."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import weighting

W = [0.5, 0.2, 0.3]
Z = [0.1, 0.2, 0.3]
F = [0.5, 1.0, 1.0]
METHODS = {
    "constant": lambda n: weighting.constant(W[:n]),
    "cosmos": lambda n: weighting.cosmos(W[:n], penalty=0.7),
    "dwa": lambda n: weighting.dwa(2),
    "famo": lambda n: weighting.famo(lower_bounds=Z[:n]),
    "geometric_mean": lambda n: weighting.geometric_mean(),
    "grad_norm": lambda n: weighting.grad_norm(),
    "imtl_l": lambda n: weighting.imtl_l(),
    "mean": lambda n: weighting.mean(),
    "pbi": lambda n: weighting.pbi(W[:n], penalty=2.0, ideal=Z[:n]),
    "random": lambda n: weighting.random(),
    "stch": lambda n: weighting.stch(mu=0.3, weights=W[:n], ideal=Z[:n]),
    "stch_log": lambda n: weighting.stch(mu=0.3, warmup=1),
    "sum": lambda n: weighting.sum(),
    "uncertainty": lambda n: weighting.uncertainty(start=0.4, factors=F[:n]),
}
# Those that refuse a loss of 0; FAMO's bounds are Z.
POSITIVE = ("famo", "geometric_mean", "grad_norm", "imtl_l", "stch_log")


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def pbi(losses, w, z):
    u = w / np.linalg.norm(w)
    along = (losses - z) @ u
    return along + 2.0 * np.linalg.norm(losses - z - along * u)


def famo(losses, z):
    d = losses - z + 1e-8
    share = np.full(d.size, 1 / d.size)
    return (share / (share / d).sum()) @ np.log(d)


# At the start: before any update, and with the parameters of `init`.
ORACLES = {
    "constant": lambda x, w, z: w @ x,
    "cosmos": lambda x, w, z: w @ x - 0.7 * cosine(w, x),
    "dwa": lambda x, w, z: x.sum(),
    "famo": lambda x, w, z: famo(x, z),
    "geometric_mean": lambda x, w, z: x.prod() ** (1 / x.size),
    "grad_norm": lambda x, w, z: x.sum(),
    "imtl_l": lambda x, w, z: x.sum(),
    "mean": lambda x, w, z: x.mean(),
    "pbi": lambda x, w, z: pbi(x, w, z),
    "stch": lambda x, w, z: 0.3 * np.log(np.exp(w * (x - z) / 0.3).sum()),
    "stch_log": lambda x, w, z: np.log(x).sum(),
    "sum": lambda x, w, z: x.sum(),
    "uncertainty": lambda x, w, z: (
        np.array([0.5, 1, 1]) @ x * np.exp(-0.4) + 0.2 * x.size
    ),
}


def extras(losses):
    return {"after": losses * 0.9, "norms": jnp.arange(1.0, losses.size + 1)}


@pytest.mark.parametrize("name", ORACLES)
@hypothesis.given(st.lists(st.floats(0.5, 20), min_size=3, max_size=3))
def test_equals_the_formula_in_float64(name, losses):
    method = METHODS[name](3)
    losses = np.array(losses, np.float32)
    want = ORACLES[name](losses.astype(np.float64), np.array(W), np.array(Z))
    np.testing.assert_allclose(
        method.loss(losses, *method.init(3)), want, rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", ORACLES)
def test_weights_are_the_slope_of_the_formula(name):
    """FAMO holds its normaliser constant: there the slope of the constant is absent."""
    method = METHODS[name](3)
    x = np.array([0.8, 2.0, 5.0])
    if name == "famo":
        share = (1 / 3) / (x - Z + 1e-8)
        want = share / share.sum()
    else:
        want = [
            (oracle(x + e) - oracle(x - e)) / 2e-6
            for oracle in [lambda x: ORACLES[name](x, np.array(W), np.array(Z))]
            for e in 1e-6 * np.eye(3)
        ]
    got = method.weights(jnp.asarray(x, jnp.float32), *method.init(3))
    assert got.shape == (3,)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_plugs_into_a_compiled_step(name):
    """Its parameters sit in the model's optimizer, and nothing is traced twice."""
    method = METHODS[name](3)
    scales = jnp.array([1.0, 2.0, 3.0])
    tx = optax.sgd(0.05)
    tasks, state = method.init(3)
    params = {"model": jnp.ones(3), "tasks": tasks}
    traces = []

    def losses_of(model):
        return 1.0 + scales * jnp.square(model - scales)

    @jax.jit
    def step(params, opt_state, state):
        traces.append(0)

        def objective(params):
            losses = losses_of(params["model"])
            return method.loss(losses, params["tasks"], state), losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        more = {"after": losses_of(params["model"]), "norms": scales}
        return params, opt_state, method.update(state, losses, **more)

    opt_state = tx.init(params)
    start = losses_of(params["model"])
    for _ in range(4):
        params, opt_state, state = step(params, opt_state, state)
    assert len(traces) == 1
    assert bool(state.finite)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    # Not every method lowers the sum, but all lower the task that is worst.
    assert losses_of(params["model"])[2] < start[2]


@pytest.mark.parametrize("name", METHODS)
def test_absent_task_is_not_read(name):
    method = METHODS[name](3)
    params, state = method.init(3)
    present = jnp.array([True, False, True])
    results = []
    for middle in (2.0, jnp.nan, -jnp.inf):
        losses = jnp.array([1.0, middle, 3.0])
        value, weights = jax.jit(jax.value_and_grad(method.loss))(
            losses, params, state, present
        )
        after = method.update(state, losses, present, **extras(losses))
        assert bool(after.finite)
        assert float(weights[1]) == 0
        results.append((value, weights, data(after)))
    chex_equal(results[0], results[1])
    chex_equal(results[0], results[2])


def data(tree):
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )


def chex_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", METHODS)
def test_no_task_present_is_zero_loss(name):
    method = METHODS[name](3)
    params, state = method.init(3)
    value, weights = jax.value_and_grad(method.loss)(
        jnp.ones(3), params, state, jnp.zeros(3, bool)
    )
    assert float(value) == 0
    np.testing.assert_array_equal(weights, np.zeros(3))


@pytest.mark.parametrize("name", POSITIVE)
def test_forbidden_losses(name):
    """Named where values are known; clipped and flagged where they are not."""
    method = METHODS[name](3)
    params, state = method.init(3)
    losses = jnp.array([1.0, -2.0, 1.0])
    with pytest.raises(ValueError, match=r"loss of task 1 is -2, wanted .* greater"):
        method.loss(losses, params, state)
    with pytest.raises(ValueError, match="task 1"):
        method.update(state, losses, **extras(losses))
    value, weights = jax.jit(jax.value_and_grad(method.loss))(losses, params, state)
    after = jax.jit(method.update)(state, losses, **extras(jnp.ones(3)))
    assert not bool(after.finite)
    assert np.isfinite(value) and np.isfinite(weights).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(data(after)))
    again = jax.jit(method.update)(after, jnp.ones(3), **extras(jnp.ones(3)))
    assert bool(again.finite)


@pytest.mark.parametrize("name", METHODS)
def test_nan_is_named_or_flagged(name):
    method = METHODS[name](3)
    params, state = method.init(3)
    losses = jnp.array([1.0, 1.0, jnp.nan])
    with pytest.raises(ValueError, match="task 2 is nan, wanted a finite number"):
        method.loss(losses, params, state)
    after = jax.jit(method.update)(state, losses, **extras(jnp.ones(3)))
    assert not bool(after.finite)


@pytest.mark.parametrize(("name", "what"), [("famo", "after"), ("grad_norm", "norms")])
def test_nan_beside_the_losses(name, what):
    method = METHODS[name](3)
    _, state = method.init(3)
    bad = {what: jnp.array([1.0, jnp.inf, 1.0])}
    with pytest.raises(ValueError, match=f"{name}: {what} of task 1 is inf"):
        method.update(state, jnp.ones(3), **bad)
    assert not bool(jax.jit(method.update)(state, jnp.ones(3), **bad).finite)
    present = jnp.array([True, False, True])
    after = method.update(state, jnp.ones(3), present, **bad)
    assert bool(after.finite)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))


@pytest.mark.parametrize("name", METHODS)
def test_one_task(name):
    method = METHODS[name](1)
    params, state = method.init(1)
    losses = jnp.array([2.0])
    assert np.isfinite(method.loss(losses, params, state))
    assert (method.weights(losses, params, state) > 0).all()
    assert bool(method.update(state, losses, **extras(losses)).finite)


@pytest.mark.parametrize(
    "name", ["constant", "cosmos", "famo", "pbi", "stch", "uncertainty"]
)
def test_number_of_tasks_must_fit(name):
    method = METHODS[name](3)
    with pytest.raises(ValueError, match=rf"{name}: .*\(3,\), losses are \(2,\)"):
        method.loss(jnp.ones(2), *method.init(3))


def test_low_precision_is_widened():
    method = weighting.geometric_mean()
    losses = jnp.array([1.0, 3.0], jnp.bfloat16)
    assert method.loss(losses, *method.init(2)).dtype == jnp.float32


@pytest.mark.parametrize("losses", [jnp.ones(()), jnp.ones((2, 2)), jnp.ones(0)])
def test_losses_are_a_vector(losses):
    with pytest.raises(ValueError, match=r"sum: losses are .*, wanted one per task"):
        weighting.sum().loss(losses, {}, weighting.sum().init(2)[1])


def test_present_is_a_mask():
    method = weighting.sum()
    with pytest.raises(ValueError, match=r"present is int32\[2\], wanted bool\[2\]"):
        method.loss(jnp.ones(2), *method.init(2), jnp.ones(2, jnp.int32))


def test_no_tasks():
    with pytest.raises(ValueError, match="num_tasks is 0"):
        weighting.sum().init(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.constant([1.0, np.nan]), "weights wants one finite number"),
        (lambda: weighting.cosmos([0.0, 0.0], penalty=1.0), "weights are all 0"),
        (lambda: weighting.cosmos([1.0], penalty=-1.0), "penalty is -1.0"),
        (lambda: weighting.pbi([0.0]), "weights are all 0"),
        (lambda: weighting.pbi([1.0], penalty=-1.0), "penalty is -1.0"),
        (lambda: weighting.stch(mu=0.0), "mu is 0.0"),
        (lambda: weighting.stch(warmup=0), "warmup is 0"),
        (lambda: weighting.stch(warmup=1, ideal=[0.0]), "neither weights nor ideal"),
        (lambda: weighting.dwa(0), "window is 0"),
        (lambda: weighting.dwa(1, temperature=0.0), "temperature is 0.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
