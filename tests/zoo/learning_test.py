"""Coefficients learned on the tasks of a zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, zoo

RECIPE = zoo.Recipe(
    steps=6,
    batch_size=8,
    optimizer={"name": "sgd", "peak": 0.05, "decay": False},
    seed=0,
    chunk=3,
)


def cross_entropy(logits, batch, task):
    found = jax.nn.log_softmax(logits(batch))
    return -jnp.mean(jnp.take_along_axis(found, batch["label"][:, None], 1))


@pytest.fixture(scope="module")
def setting(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    material = zoo.Material(evaluator, labels=True)
    taus = merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])
    rows = [material.labelled("train", task) for task in range(3)]
    run = zoo.coefficients(material, cross_entropy, RECIPE)
    heads = {"head": material.heads()}
    start = merging.init_coefficients(taus, 0.1)
    trace = run(taus, start, RECIPE.batches(rows), heads)
    return evaluator, taus, rows, run, heads, start, trace


def test_the_first_loss_is_that_of_the_start(setting):
    """Cross-entropy in NumPy, of the evaluator's logits, task by task."""
    evaluator, taus, rows, _, _, start, trace = setting
    model = merging.compose(evaluator.zoo.base, taus, start)
    first = next(RECIPE.batches(rows))
    for task in range(3):
        batch = {name: jnp.asarray(x[0, task]) for name, x in first.items()}
        logits = np.asarray(evaluator.logits_of(task)(model, batch), np.float64)
        top = logits.max(1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        want = -log_p[np.arange(8), np.asarray(batch["label"])].mean()
        np.testing.assert_allclose(trace.losses[0, task], want, rtol=1e-4)


def test_a_trace_has_every_loss_and_every_stop(setting):
    *_, start, trace = setting
    assert trace.losses.shape == (6, 3)
    assert [step for step, _ in trace.path] == [3, 6]
    end = trace.path[-1][1]
    jax.tree.map(np.testing.assert_array_equal, end, trace.variables)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), start, end)
    assert all(jax.tree.leaves(moved))


def test_a_loss_that_is_not_finite_stops_it(setting):
    _, taus, rows, run, heads, start, _ = setting
    bad = jax.tree.map(lambda x: x * jnp.nan, start)
    with pytest.raises(ValueError, match="a loss is not finite after 0 steps"):
        run(taus, bad, RECIPE.batches(rows), heads)
