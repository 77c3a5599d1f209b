import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import train

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 3)).astype(np.float32)
Y = RNG.integers(0, 2, 23).astype(np.int32)


def batches(size):
    return [
        {"x": X[i : i + size], "label": Y[i : i + size]} for i in range(0, 23, size)
    ]


def predict(params, batch):
    guess = (batch["x"] @ params > 0).astype(jnp.int32)
    return {"accuracy": guess == batch["label"], "norm": (batch["x"] ** 2).sum(-1)}


PARAMS = jnp.asarray([1.0, -1.0, 0.5])


@pytest.mark.parametrize("size", [1, 4, 8, 23, 50])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_example_counts_once(size, sharded):
    mesh = train.make_mesh(4, 2) if sharded else None
    found = train.evaluate(predict, batches(size), params=PARAMS, mesh=mesh)
    hits = np.sum((X @ np.asarray(PARAMS) > 0) == Y)
    assert found["count"] == 23
    assert found["accuracy"] == hits / 23
    np.testing.assert_allclose(found["norm"], (X.astype(float) ** 2).sum(-1).mean())


def test_one_trace_for_ragged_ends_and_new_parameters():
    traces = []

    def counting(params, batch):
        traces.append(1)
        return predict(params, batch)

    for scale in (1.0, 2.0):
        train.evaluate(counting, batches(8), params=scale * PARAMS)
    assert len(traces) == 1


def test_tasks_keep_their_order_and_functions():
    tasks = {"b": batches(8), "a": batches(5)}
    found = train.evaluate_tasks(predict, tasks, params=PARAMS)
    assert list(found) == ["b", "a"]
    assert found["a"] == pytest.approx(found["b"])
    functions = {"a": lambda b: {"x": b["label"]}, "b": lambda b: {"x": b["label"] * 0}}
    each = train.evaluate_tasks(functions, tasks)
    assert each["b"]["x"] == 0 and each["a"]["x"] == Y.mean()


@pytest.mark.parametrize(
    ("function", "data", "message"),
    [
        (lambda b: {"x": b["label"]}, [], "there are no batches"),
        (lambda b: {"x": b["x"]}, batches(4), r"'x' of predict_fn wants shape \(4,\)"),
        (lambda b: {"count": b["label"]}, batches(4), "without a 'count'"),
        (lambda b: b["label"], batches(4), "wants to return a dict"),
        (lambda b: {"x": b["x"][:, 0] / 0}, batches(4), "'x' is not finite in batch 0"),
        (lambda b: {"x": b["label"]}, batches(4)[::-1], "batch 1 has 4.*had 3"),
        (lambda b: {"x": b}, [{"a": X, "b": Y[:2]}], "one number of examples"),
    ],
)
def test_bad_input(function, data, message):
    with pytest.raises(ValueError, match=message):
        train.evaluate(function, data)


def test_task_without_a_function_and_failing_task_are_named():
    with pytest.raises(ValueError, match=r"no predict_fn for task 'b', found \['a'\]"):
        train.evaluate_tasks({"a": predict}, {"b": []})
    with pytest.raises(ValueError, match="task 'b': evaluate: there are no batches"):
        train.evaluate_tasks(predict, {"b": []}, params=PARAMS)


def test_padding_rows_never_reach_the_sum():
    def inverse(batch):
        return {"inverse": 1 / batch["x"]}

    data = [{"x": np.full(4, 2.0, np.float32)}, {"x": np.full(1, 4.0, np.float32)}]
    assert train.evaluate(inverse, data)["inverse"] == (4 / 2 + 1 / 4) / 5
    assert jax.device_count() == 8
