import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax.models import multitask
from mtl_jax.models.multitask.ltb import choose

OUTPUTS = {"a": 2, "b": 1, "c": 1}


def dense(width):
    return lambda: models.Mlp((width,), activation="tanh", activate_final=True)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (5, 4))


@pytest.fixture(scope="module")
def ready(x, fill):
    module = multitask.LTB(OUTPUTS, stages=(dense(3), dense(3)))
    return module, fill(module, x)


def with_parents(params, inner, task):
    """Logits that choose the given parents."""
    task = dict(zip(OUTPUTS, 5.0 * jnp.eye(3)[jnp.asarray(task)], strict=True))
    return {
        **params,
        "branch_logits": 5.0 * jnp.eye(3)[jnp.asarray(inner)][None],
        **{f"branch_logits_{name}": row for name, row in task.items()},
    }


def path(params, nodes, name, x):
    """The network along one node per stage."""
    h = np.asarray(x, np.float64)
    for level, node in enumerate(nodes):
        layer = params[f"nodes_{level}_{node}"]["layers_0"]
        h = np.tanh(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
    head = params[f"heads_{name}"]["output"]
    return h @ np.asarray(head["kernel"]) + np.asarray(head["bias"])


@pytest.mark.parametrize(
    ("inner", "task"),
    [([0, 1, 2], [0, 1, 2]), ([0, 0, 0], [0, 0, 0]), ([2, 0, 1], [1, 1, 0])],
    ids=["apart", "one trunk", "a tree"],
)
def test_each_task_follows_its_path(inner, task, ready, x):
    module, params = ready
    params = with_parents(params, inner, task)
    found = module.apply({"params": params}, x)
    for t, name in enumerate(OUTPUTS):
        nodes = (inner[task[t]], task[t])
        want = path(params, nodes, name, x)
        np.testing.assert_allclose(found[name], want, rtol=1e-4, atol=1e-4)
    chosen = module.apply({"params": params}, method="tree")
    assert [c.tolist() for c in chosen] == [inner, task]


def test_choices_are_samples_of_the_logits():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    soft = jax.vmap(lambda key: choose(logits, key, 0.5))(keys)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)
    shares = np.bincount(np.argmax(soft[:, 0], -1), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.03)
    cold = jax.vmap(lambda key: choose(logits, key, 0.01))(keys)
    assert np.mean(np.max(cold, -1)) > 0.99


def test_straight_through_is_hard_forward_and_soft_backward():
    logits = jnp.array([[0.3, -0.2], [0.1, 0.4]])
    key, values = jax.random.key(3), jnp.array([[1.0, 2.0], [4.0, 3.0]])

    def value(logits, straight_through):
        weights = choose(logits, key, 0.7, straight_through=straight_through)
        return jnp.sum(weights * values), weights

    hard, weights = jax.grad(value, has_aux=True)(logits, True)
    soft, relaxed = jax.grad(value, has_aux=True)(logits, False)
    np.testing.assert_allclose(np.sort(weights, -1), [[0, 1], [0, 1]], atol=1e-6)
    np.testing.assert_array_equal(np.argmax(weights, -1), np.argmax(relaxed, -1))
    np.testing.assert_allclose(hard, soft, rtol=1e-6)
    assert np.abs(soft).max() > 0


def test_samples_need_their_rng_and_take_a_temperature(ready, x):
    module, params = ready

    def parents(key, temperature):
        z = module.apply(
            {"params": params},
            x,
            method="encode",
            sample=True,
            temperature=temperature,
            rngs={"branch": jax.random.key(key)},
        )
        return np.asarray(z["parents"])

    np.testing.assert_array_equal(parents(0, 1.0), parents(0, 1.0))
    assert np.abs(parents(0, 1.0) - parents(1, 1.0)).max() > 0
    assert parents(0, 0.01).max(-1).min() > parents(0, 100.0).max(-1).max()


def test_choices_are_drawn_where_there_is_an_rng(ready, x):
    module, params = ready

    def loss(params, rngs, **options):
        out = module.apply({"params": params}, x, rngs=rngs, **options)
        return sum(jnp.sum(y * y) for y in out.values())

    rngs = {"branch": jax.random.key(0)}
    drawn = jax.grad(loss)(params, rngs)
    assert np.abs(drawn["branch_logits"]).max() > 0
    fixed = jax.grad(loss)(params, None)
    held = jax.grad(lambda p: loss(p, rngs, sample=False))(params)
    jax.tree.map(np.testing.assert_array_equal, fixed, held)
    assert not np.any(fixed["branch_logits"])


def test_no_stages_are_refused(x):
    with pytest.raises(ValueError, match="LTB: stages must hold"):
        jax.eval_shape(multitask.LTB(OUTPUTS, stages=()).init, jax.random.key(0), x)
