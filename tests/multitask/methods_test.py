import functools

import jax
import numpy as np
import optax
import pytest

from mtl_jax import aggregation, multitask, train, weighting


def test_simplex_covers_what_it_says():
    points = multitask.simplex(3, 6)
    assert len(points) == 10
    np.testing.assert_allclose(np.sum(points, 1), 3)
    assert min(map(min, points)) == 0.5 and (1.0, 1.0, 1.0) in [
        tuple(np.round(p, 6)) for p in points
    ]
    assert multitask.simplex(5, 1) == ((1.0,) * 5,)


def test_fixed_weights_are_a_weighted_sum(problem):
    trainable = multitask.scalarised((2.0, 0.0, 0.5)).make(problem, optax.sgd(1.0))
    params = trainable.init(jax.random.key(0))
    batch = {name: x[:8] for name, x in problem.splits["train"].items()}
    each, _ = problem.loss_fn(params, batch, jax.random.key(0))
    found, _ = trainable.loss_fn(params, batch, jax.random.key(0))
    np.testing.assert_allclose(found, 2 * each[0] + 0.5 * each[2], rtol=1e-6)
    with pytest.raises(ValueError, match="2 weights for 3 tasks"):
        multitask.scalarised((1.0, 1.0)).make(problem, optax.sgd(1.0))


def test_fixed_weights_of_own_rows_are_exact_in_microbatches(own_rows_problem):
    made = multitask.scalarised((1.0, 2.0)).make(own_rows_problem, optax.sgd(0.1))
    batch = {name: x[:8] for name, x in own_rows_problem.splits["train"].items()}
    mesh = train.make_mesh(devices=jax.devices()[:1])
    whole, parts = (
        train.Trainer(made, mesh=mesh, accumulate=n).fit(lambda step: batch, steps=2)
        for n in (1, 4)
    )
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_and_contests_that_make_no_sense():
    method = multitask.scalarised((1.0,))
    row = multitask.Row(name="one", candidates=(method,))
    with pytest.raises(ValueError, match="row 'none': wants at least one"):
        multitask.Row(name="none", candidates=())
    with pytest.raises(ValueError, match=r"unique names, found \['one'\] twice"):
        multitask.Contest(rows=(row, row))


def test_aggregators_act_on_shared_leaves_and_weightings_on_all(problem):
    surgery = multitask.aggregated("PCGrad", aggregation.pcgrad, seed=3)
    made = surgery.make(problem, optax.sgd(1.0))
    assert made.shared == problem.model.shared_paths and made.task_names[0] == "sign"
    assert surgery.about["options"] == {"seed": 3}
    weighted = multitask.aggregated("UW", weighting.uncertainty)
    assert weighted.make(problem, optax.sgd(1.0)).shared == (".*",)
    counted = multitask.aggregated("MoCo", aggregation.moco)
    assert counted.make(problem, optax.sgd(1.0)).aggregator.rule is None
    assert "weighting" in weighted.about and "aggregation" in counted.about


def mine():
    return aggregation.mean()


def test_factories_of_others_have_addresses_of_their_own():
    assert multitask.aggregated("mine", mine).about["factory"].endswith(".mine")
    for factory in (lambda: mine(), functools.partial(aggregation.pcgrad, seed=1)):
        with pytest.raises(ValueError, match="method 'x': .* give `about`"):
            multitask.aggregated("x", factory)
        given = multitask.aggregated("x", factory, about={"seed": 1})
        assert given.about == {"seed": 1}


def test_tuned_weights_are_never_worse_than_what_equal_ones_offer():
    for count, steps in ((2, 5), (3, 6), (4, 1)):
        equal, tuned = multitask.baselines(count, steps)
        names = [method.name for method in tuned.candidates]
        assert names[0] == equal.candidates[0].name and len(set(names)) == len(names)


def test_only_tasks_with_rows_of_their_own_are_counted(problem, own_rows_problem):
    method = multitask.aggregated("MGDA", aggregation.mgda)
    assert method.make(problem, optax.sgd(1.0)).task_counts is None
    made = method.make(own_rows_problem, optax.sgd(1.0))
    rows = own_rows_problem.splits["train"]
    counts = made.task_counts({name: x[:10] for name, x in rows.items()})
    np.testing.assert_array_equal(counts, [8, 2])
    plain = multitask.scalarised((1.0, 1.0, 1.0)).make(problem, optax.sgd(1.0))
    assert plain.task_counts is None and plain.aggregator is None


def test_two_batches_are_part_of_the_address():
    one, two = (multitask.aggregated("MoDo", aggregation.modo, draws=n) for n in (1, 2))
    assert (one.draws, two.draws) == (1, 2) and one.about != two.about
