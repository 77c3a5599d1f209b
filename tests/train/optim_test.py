import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax import train
from mtl_jax.train import optim

pytestmark = pytest.mark.fast

PARAMS = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("constant", {"value": 0.5}, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ("constant", {"value": 1.0, "warmup_steps": 2}, [0, 0.5, 1, 1, 1]),
        ("linear", {"peak": 1.0, "steps": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", {"peak": 1.0, "steps": 4, "warmup_steps": 2}, [0, 0.5, 1, 0.5, 0]),
        (
            "warmup_cosine",
            {"peak": 2.0, "steps": 4, "warmup_steps": 2, "end": 1.0},
            [0, 1, 2, 1.5, 1],
        ),
        (
            "warmup_cosine",
            {"peak": 1.0, "steps": 4},
            [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0],
        ),
    ],
)
def test_schedules(name, options, values):
    made = train.schedule(name, **options)
    np.testing.assert_allclose([made(t) for t in range(5)], values, atol=1e-6)


def one_update(tx, grads):
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd"])
def test_names_are_optax_functions(name, equal):
    grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 4.0)}
    equal(
        one_update(train.optimizer(name, 0.1), grads),
        one_update(getattr(optax, name)(0.1), grads),
    )


def test_no_decay_spares_only_the_named_leaves():
    tx = train.optimizer("adamw", 0.1, no_decay=("bias$",), weight_decay=0.5)
    updates = one_update(tx, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_clipping_comes_first():
    tx = train.optimizer("sgd", 1.0, clip_norm=1.0)
    updates = one_update(tx, {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)})
    np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-6)


def test_schedule_by_name_inside_an_optimizer():
    tx = train.optimizer("sgd", ("constant", {"value": 0.25}))
    updates = one_update(tx, jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_array_equal(updates["bias"], -0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.optimizer("adamW", 0.1), "found 'adamW'.*did you mean 'adamw'"),
        (lambda: train.optimizer("sgd", 0.1, b1=0.9), "'sgd' takes no 'b1', only"),
        (lambda: train.optimizer("sgd", 0.1, no_decay=("b",)), "has no weight decay"),
        (lambda: train.optimizer("sgd", 0.1, clip_norm=0.0), "wants a positive norm"),
        (lambda: train.schedule("cosine"), "found 'cosine', wanted one of"),
        (lambda: train.schedule("linear", peak=1.0), "'linear' wants 'steps'"),
        (
            lambda: train.schedule("linear", peak=1.0, steps=5, warmup_steps=5),
            "wants 0 <= warmup_steps < steps",
        ),
        (
            lambda: train.optimizer("adamw", 0.1, no_decay=("norm",)).init(PARAMS),
            "no_decay pattern 'norm' matches none of the 2 trained leaves",
        ),
    ],
)
def test_bad_names_and_options(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_rates_that_are_no_rates(rate):
    with pytest.raises(ValueError, match="optimizer: learning_rate wants"):
        optim.optimizer("adam", rate)


def test_options_that_are_not_finite():
    with pytest.raises(ValueError, match="schedule: peak wants a finite number"):
        optim.schedule("linear", peak=float("nan"), steps=4)
    with pytest.raises(ValueError, match="optimizer: b1 wants a finite number"):
        optim.optimizer("adam", 0.1, b1=float("nan"))


def first_rates(tx, count):
    params, rates = {"w": jnp.zeros(())}, []
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    return rates


def test_over_steps_spreads_the_schedule_over_the_run():
    options = {"name": "sgd", "peak": 0.5, "warmup": 0.25}
    with jax.numpy_dtype_promotion("standard"):
        tx = optim.over_steps(8, options)
        constant = optim.over_steps(8, {"name": "sgd", "peak": 0.5, "decay": False})
        rates, steady = first_rates(tx, 8), first_rates(constant, 2)
    assert rates[:3] == [0, 0.25, 0.5]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.1
    assert steady == [0.5, 0.5]
    assert options == {"name": "sgd", "peak": 0.5, "warmup": 0.25}
    with pytest.raises(ValueError, match="over_steps: options lack peak"):
        optim.over_steps(8, {"name": "sgd"})
