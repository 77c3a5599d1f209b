"""Targets learned from the task vectors of others."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import merging, tree, zoo
from mtl_jax.zoo import transfer

RECIPE = zoo.Recipe(
    steps=4,
    batch_size=8,
    optimizer={"name": "adam", "peak": 0.1, "decay": False},
    seed=0,
    chunk=2,
)


@pytest.fixture(scope="module")
def material(tiny_zoo, quiet):
    evaluator = zoo.Evaluator(tiny_zoo, remember=False, progress=quiet)
    return zoo.Material(evaluator, labels=True)


@pytest.fixture(scope="module")
def taus(tiny_zoo):
    return merging.task_vectors(tiny_zoo.base, tiny_zoo.experts["standard"])


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_own_vector_is_left_out(material, taus):
    """Its place holds NaN in turn; nothing that is learned for its task sees it."""
    found = transfer.few_shot(taus, material, RECIPE, 2)
    poisoned = jax.tree.map(lambda x: x.at[1].set(jnp.nan), taus)
    rest = transfer.others(poisoned, 1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(rest))
    same(rest, found[1][0])
    same(rest, jax.tree.map(lambda x: x[np.array([0, 2])], taus))
    assert all(len(x) == 2 for x in jax.tree.leaves(found[1][1]))


@hypothesis.given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8)
)
def test_negation_never_returns_what_hurts_the_control(trials):
    chosen = transfer.last_admissible(trials)
    assert trials[chosen][1] >= 0.95 * trials[0][1]
    assert trials[chosen][0] <= trials[0][0]
    assert all(c >= 0.95 * trials[0][1] for _, c in trials[: chosen + 1])


def test_few_labels_that_do_harm_leave_the_base(material, taus):
    rest = transfer.others(taus, 0)
    start = merging.init_coefficients(rest)
    ruin = jax.tree.map(lambda x: x - 60.0, start)
    trace = zoo.Trace(variables=ruin, losses=np.zeros((1, 1)), path=((1, ruin),))
    rows = material.labelled("validation", 0)
    model = merging.compose(material.zoo.base, rest, ruin)
    base = material.predict(material.zoo.base, 0, rows) == rows["label"]
    harmed = material.predict(model, 0, rows) == rows["label"]
    assert harmed.mean() < base.mean()
    same(transfer.best_point(material, rest, trace, 0), start)


def test_budgets_choose_from_the_others(material, taus):
    rest = transfer.others(taus, 0)
    whole = transfer.chooser(material, 2, "blocks", 2, 0)(rest, 0)
    same(whole, rest)
    for how in ("blocks", "vectors", "random"):
        one = transfer.chooser(material, 1, how, 2, 0)(rest, 0)
        sources = [
            int(np.argmax([np.array_equal(x[0], y[t]) for t in range(2)]))
            for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(rest), strict=True)
        ]
        assert how == "blocks" or len(set(sources)) == 1


def test_blocks_are_ranked_by_slopes_of_the_loss(material, taus):
    """By finite differences of the loss along every coefficient, at the base."""
    rest = transfer.others(taus, 0)
    one = transfer.chooser(material, 1, "blocks", 2, 0)(rest, 0)
    rows = material.labelled("train", 0, per_class=2, seed=0)
    head = dict(material.zoo.tasks[0].head)

    @jax.jit
    def loss(coeffs):
        model = merging.compose(material.zoo.base, rest, coeffs)
        logits = material.logits(model, rows, head, material.args)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, rows["label"][:, None], 1))

    start = merging.init_coefficients(rest)
    leaves, treedef = jax.tree.flatten(start)
    for i, name in enumerate(tree.paths(start)):
        slopes = []
        for task in range(2):
            ends = []
            for step in (0.05, -0.05):
                moved = [
                    x if j != i else x.at[task].set(step) for j, x in enumerate(leaves)
                ]
                ends.append(float(loss(treedef.unflatten(moved))))
            slopes.append(abs(ends[0] - ends[1]) / 0.1)
        if abs(slopes[0] - slopes[1]) > 0.05 * max(slopes):
            want = jax.tree.leaves(rest)[i][int(np.argmax(slopes))]
            np.testing.assert_array_equal(jax.tree.leaves(one)[i][0], want, name)


def test_adaptation_sees_no_labels(tiny_zoo, quiet, taus, material):
    """Other labels on every split change nothing, bit for bit."""
    turned = tuple(
        dataclasses.replace(
            task,
            splits={
                split: {**rows, "label": np.roll(rows["label"], 3)}
                for split, rows in task.splits.items()
            },
        )
        for task in tiny_zoo.tasks
    )
    other = dataclasses.replace(tiny_zoo, tasks=turned)
    blind = zoo.Material(zoo.Evaluator(other, remember=False, progress=quiet))
    first = transfer.adapted(taus, zoo.Material(material.evaluator), RECIPE, (0.1, 0.5))
    second = transfer.adapted(taus, blind, RECIPE, (0.1, 0.5))
    same(first, second)
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(first))


def test_a_quarter_of_a_batch_is_trusted(material):
    stacks = list(transfer._trusting(material, RECIPE, 1))
    known = np.concatenate([stack["known"] for stack in stacks])
    assert known.shape == (4, 1, 8) and (known.sum(-1) == 2).all()
    assert np.concatenate([s["draw"] for s in stacks]).ravel().tolist() == [0, 1, 2, 3]
    inputs = np.concatenate([stack["inputs"] for stack in stacks])
    labels = np.concatenate([stack["label"] for stack in stacks])
    guessed = material.predict(material.zoo.base, 1, {"inputs": inputs[known]})
    np.testing.assert_array_equal(labels[known], guessed)
