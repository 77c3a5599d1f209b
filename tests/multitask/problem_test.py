import dataclasses
import functools

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


def with_gates(problem, **options):
    """The same tasks behind gates that choose; two tenths of the penalty are on."""
    expert = {"model": "mlp", "features": (4,), "activate_final": True}
    model = multitask.build(
        "dselect_k",
        {t.name: t.size for t in problem.targets},
        expert=expert,
        num_experts=3,
        **options,
    )
    return dataclasses.replace(problem, model=model)


@pytest.mark.parametrize("own", [False, True])
def test_a_sown_penalty_moves_the_gates_by_its_gradient(problem, own_rows_problem, own):
    source = own_rows_problem if own else problem
    found = with_gates(source, entropy=0.2, outside=0.3)
    plain = with_gates(source, entropy=0.0, outside=0.0)
    params = jax.jit(found.init)(jax.random.key(0))
    batch = {name: jnp.asarray(x[:15]) for name, x in source.splits["train"].items()}

    @functools.partial(jax.jit, static_argnums=0)
    def both(which, params):
        return (
            which.loss_fn(params, batch, None),
            jax.grad(lambda p: jnp.sum(which.loss_fn(p, batch, None)[0]))(params),
        )

    @jax.jit
    @jax.value_and_grad
    def penalty(params):
        """By the module itself, gate by gate."""
        _, state = found.model.apply(
            {"params": params}, batch["x"], mutable=["losses"], method="encode"
        )
        return sum(jax.tree.leaves(state))

    # Entropy of 2 selectors over 3 of 4 codes, and 1 / (3/4), at near-uniform codes.
    each = 0.2 * 2 * 3 / 4 * np.log(4) + 0.3 * 2 * 4 / 3
    (value, slope), count = penalty(params), len(source.targets)
    np.testing.assert_allclose(value, count * each, rtol=0.02)
    moved = {name for name, x in slope.items() if any(map(np.any, jax.tree.leaves(x)))}
    assert moved == {f"gates_{name}" for name in source.task_names}
    (losses, metrics), grads = both(found, params)
    (without, nothing), before = both(plain, params)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-4, atol=1e-6),
        grads,
        before,
        slope,
    )
    np.testing.assert_allclose(losses - without, [value / count] * count, rtol=1e-4)
    np.testing.assert_allclose(metrics["penalty"], value, rtol=1e-6)
    assert nothing["penalty"] == 0
    assert found.evaluate(params, "test") == plain.evaluate(params, "test")


def test_sown_arrays_are_summed(problem, monkeypatch):
    sown = {"losses": {"a": (jnp.ones(3),), "b": (jnp.array(2.0),)}}
    monkeypatch.setattr(type(problem), "_apply", lambda self, *a, **b: (None, sown))
    batch = {name: x[:2] for name, x in problem.splits["train"].items()}
    _, penalty = problem.encode_with_penalty({}, batch)
    assert penalty.shape == () and penalty == 5


def test_a_batch_without_a_task_pays_the_whole_penalty(own_rows_problem):
    found = with_gates(own_rows_problem)
    params = jax.jit(found.init)(jax.random.key(0))
    rows = own_rows_problem.splits["train"]
    batch = {name: x[rows["task"] == 1][:5] for name, x in rows.items()}
    np.testing.assert_array_equal(found.task_counts(batch), [0, 5])
    losses, metrics = found.loss_fn(params, batch, None)
    own = found.task_losses(found.outputs(params, batch), batch)
    assert own[0] == 0
    np.testing.assert_allclose(losses, own + metrics["penalty"] / 2, rtol=1e-6)


def test_rows_are_counted_by_task(problem, own_rows_problem):
    def head(which):
        return {name: x[:11] for name, x in which.splits["train"].items()}

    np.testing.assert_array_equal(problem.task_counts(head(problem)), [11, 11, 11])
    np.testing.assert_array_equal(
        own_rows_problem.task_counts(head(own_rows_problem)), [8, 3]
    )
