import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import multitask


@pytest.fixture(scope="module")
def params(problem):
    return problem.init(jax.random.key(0))


def test_losses_are_those_of_the_definitions(problem, params):
    batch = {name: x[:20] for name, x in problem.splits["train"].items()}
    found, metrics = problem.loss_fn(params, batch, jax.random.key(0))
    out = {
        k: np.asarray(v, np.float64) for k, v in problem.outputs(params, batch).items()
    }
    sign, third, total = out["sign"][:, 0], out["third"], out["sum"][:, 0]
    shifted = third - np.log(np.exp(third).sum(-1, keepdims=True))
    wanted = [
        np.mean(np.log1p(np.exp(np.where(batch["sign"] > 0, -sign, sign)))),
        -np.mean(shifted[np.arange(20), batch["third"]]),
        np.mean((total - batch["sum"]) ** 2),
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert metrics == {} and found.dtype == jnp.float32


def test_metrics_are_those_of_the_definitions(problem, params):
    rows = problem.splits["test"]
    out = {k: np.asarray(v) for k, v in problem.outputs(params, rows).items()}
    found = problem.evaluate(params, "test")
    sign = out["sign"][:, 0]
    ones, zeros = sign[rows["sign"] == 1], sign[rows["sign"] == 0]
    wanted = {
        "sign": np.mean((ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros)),
        "third": np.mean(out["third"].argmax(-1) == rows["third"]),
        "sum": np.sqrt(np.mean((out["sum"][:, 0] - rows["sum"]) ** 2)),
    }
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_task_sees_its_own_rows_only(own_rows_problem):
    problem = own_rows_problem
    params = problem.init(jax.random.key(1))
    rows = problem.splits["train"]
    batch = {name: x[:40] for name, x in rows.items()}
    whole, _ = problem.loss_fn(params, batch, jax.random.key(0))
    for task in (0, 1):
        own = {name: x[batch["task"] == task] for name, x in batch.items()}
        alone, _ = problem.loss_fn(params, own, jax.random.key(0))
        np.testing.assert_allclose(alone[task], whole[task], rtol=1e-5)
        assert alone[1 - task] == 0  # Absent from the batch: no loss, no gradient.
        grads = jax.jacobian(lambda p, b=own: problem.loss_fn(p, b, None)[0])(params)
        other = jax.tree.leaves(jax.tree.map(lambda g, t=task: g[1 - t], grads))
        assert all(not np.any(leaf) for leaf in other)


def test_some_of_the_tasks(problem, own_rows_problem):
    part = multitask.take(problem, ["sum"])
    assert part.task_names == ("sum",)
    assert sorted(part.init(jax.random.key(0))) == ["encoder", "heads_sum"]
    own = multitask.take(own_rows_problem, ["b"])
    rows, whole = own.splits["test"], own_rows_problem.splits["test"]
    assert set(rows["task"]) == {0}
    np.testing.assert_array_equal(rows["label"], whole["label"][whole["task"] == 1])
    for names in ([], ["nose"]):
        with pytest.raises(ValueError, match="wanted some of sign, third, sum"):
            multitask.take(problem, names)


def test_the_address_follows_rows_tasks_and_model(problem):
    def changed(**options):
        return dataclasses.replace(problem, **options).digest()

    other_rows = {**problem.splits, "test": problem.splits["train"]}
    digests = {
        problem.digest(),
        changed(splits=other_rows),
        changed(about={"hidden": 17}),
        changed(name="other"),
    }
    assert len(digests) == 4 and changed() in digests


def test_problems_that_do_not_hold_together(problem):
    with pytest.raises(ValueError, match=r"targets are .*'sign': 1.*outputs are"):
        dataclasses.replace(problem, targets=problem.targets[:2])
    with pytest.raises(ValueError, match="at least one target"):
        dataclasses.replace(problem, targets=())
    other = (problem.targets[0]._replace(metric="mean_iou"), *problem.targets[1:])
    with pytest.raises(ValueError, match="metric of 'sign' is 'mean_iou', known"):
        dataclasses.replace(problem, targets=other)


def test_evaluation_refuses_what_has_no_answer(problem, own_rows_problem, params):
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(ValueError, match="outputs of 'sign' are not finite"):
        problem.evaluate(bad, "test")
    rows = own_rows_problem.splits["test"]
    empty = {name: x[rows["task"] == 0] for name, x in rows.items()}
    splits = {**own_rows_problem.splits, "test": empty}
    lonely = dataclasses.replace(own_rows_problem, splits=splits)
    with pytest.raises(ValueError, match="no test row belongs to 'b'"):
        lonely.evaluate(lonely.init(jax.random.key(0)), "test")
