import collections
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax import data

pytestmark = pytest.mark.fast


def rows(n, offset=0):
    return data.ArraySource({"x": np.arange(n) + offset, "y": np.arange(n) % 3})


def seen(dataset, batches=None):
    count = len(dataset) if batches is None else batches
    return np.concatenate([dataset[i]["x"] for i in range(count)])


def test_every_epoch_is_a_new_order_of_all_rows():
    stream = seen(data.pipeline(rows(12), batch_size=4, seed=3), 6)
    first, second = stream[:12], stream[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) != list(second)
    assert list(first) != list(range(12))


def test_order_is_a_function_of_the_seed():
    one, same, other = (
        seen(data.pipeline(rows(50), batch_size=5, seed=s), 20) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_batches_run_over_epoch_ends():
    pipe = data.pipeline(rows(5), batch_size=4)
    assert [pipe[i]["x"].shape for i in range(5)] == [(4,)] * 5
    assert collections.Counter(seen(pipe, 5)) == dict.fromkeys(range(5), 4)


def test_one_pass_without_remainder_and_with():
    kept = data.pipeline(rows(10), batch_size=4, repeat=False, shuffle=False)
    np.testing.assert_array_equal(seen(kept), np.arange(8))
    whole = data.evaluation(rows(10), batch_size=4)
    np.testing.assert_array_equal(seen(whole), np.arange(10))
    assert len(whole[2]["x"]) == 2


def test_a_pass_that_never_fills_a_batch_is_refused():
    with pytest.raises(ValueError, match="3 rows per shard never fill a batch of 4"):
        data.pipeline(rows(3), batch_size=4, repeat=False)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("kind", ["pipeline", "mixture", "lockstep"])
def test_state_is_one_index_and_resumes_exactly(kind, threads):
    def jitter(element, rng):
        return {**element, "noise": rng.standard_normal(2)}

    if kind == "pipeline":
        pipe = data.pipeline(rows(17), batch_size=4, seed=5, random_transform=jitter)
    else:
        make = getattr(data, kind)
        pipe = make({"a": rows(7), "b": rows(13, 100)}, batch_size=4, seed=5)
    iterator = data.iterate(pipe, num_threads=threads)
    for _ in range(6):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": 6}
    straight = [next(iterator) for _ in range(8)]
    resumed = data.iterate(pipe, num_threads=threads)
    resumed.set_state(state)
    for wanted in straight:
        found = next(resumed)
        assert found.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(found[key], wanted[key])


@hypothesis.given(
    n=st.integers(4, 40), shards=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_one_pass_shards_partition_the_rows(n, shards, seed):
    parts = [
        seen(
            data.pipeline(
                rows(n),
                batch_size=3,
                seed=seed,
                repeat=False,
                drop_remainder=False,
                shard_index=i,
                num_shards=shards,
            )
        )
        for i in range(shards)
    ]
    assert sorted(np.concatenate(parts)) == list(range(n))


def test_endless_shards_stay_disjoint_in_every_epoch():
    pipes = [
        data.pipeline(rows(13), batch_size=2, seed=1, shard_index=i, num_shards=3)
        for i in range(3)
    ]
    streams = [seen(pipe, 20) for pipe in pipes]
    left_out = []
    for epoch in range(10):
        part = np.concatenate([s[4 * epoch : 4 * epoch + 4] for s in streams])
        assert len(set(part)) == 12
        left_out.append((set(range(13)) - set(part)).pop())
    assert len(set(left_out)) > 1


@pytest.mark.parametrize("index, shards", [(2, 2), (-1, 2), (0, 0)])
def test_bad_shards_are_refused(index, shards):
    with pytest.raises(ValueError, match="shard_index"):
        data.pipeline(rows(8), batch_size=2, shard_index=index, num_shards=shards)


def test_too_many_shards_are_refused():
    with pytest.raises(ValueError, match="2 rows cannot feed 3 shards"):
        data.pipeline(rows(2), batch_size=1, num_shards=3)


def test_weights_match_the_formula():
    sizes = np.array([100.0, 400.0, 1600.0])
    np.testing.assert_allclose(data.mixture_weights(sizes), sizes / sizes.sum())
    found = data.mixture_weights(sizes, temperature=2.0)
    np.testing.assert_allclose(found, [1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(data.mixture_weights(sizes, 1e9), np.ones(3) / 3)
    cold = data.mixture_weights(sizes, 1e-3)
    np.testing.assert_allclose(cold, [0, 0, 1], atol=1e-12)


@pytest.mark.parametrize("sizes, temperature", [([1, 0], 1.0), ([1, 2], 0.0)])
def test_weights_must_be_positive(sizes, temperature):
    with pytest.raises(ValueError, match="must be positive"):
        data.mixture_weights(sizes, temperature)


@pytest.mark.parametrize("single", [False, True])
def test_mixture_keeps_proportions(single):
    pipe = data.mixture(
        [rows(20), rows(60), rows(5)],
        batch_size=8,
        weights=[1, 2, 1],
        single_task_batches=single,
    )
    batches = [pipe[i]["task"] for i in range(100)]
    if single:
        assert all(len(set(batch)) == 1 for batch in batches)
    shares = np.bincount(np.concatenate(batches)) / 800
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.011)
    assert batches[0].dtype == np.int32


def test_mixture_defaults_to_sizes_and_task_tags_follow_names():
    sources = {"big": rows(300), "small": rows(100, 1000)}
    pipe = data.mixture(sources, batch_size=10)
    tasks = np.concatenate([pipe[i]["task"] for i in range(40)])
    x = seen(pipe, 40)
    assert np.all((x >= 1000) == (tasks == 1))
    assert abs((tasks == 0).mean() - 0.75) < 0.01


def test_mixture_visits_every_row_of_a_task_before_repeating():
    pipe = data.mixture([rows(6), rows(6)], batch_size=4, weights=[1, 1])
    x, tasks = seen(pipe, 6), np.concatenate([pipe[i]["task"] for i in range(6)])
    for task in (0, 1):
        assert sorted(x[tasks == task][:6]) == list(range(6))
    assert list(x[tasks == 0]) != list(x[tasks == 1])


def test_transforms_per_task_by_name():
    def shift(by):
        return lambda e: {"x": e["x"] + by}

    pipe = data.mixture(
        {"a": rows(4), "b": rows(4)},
        batch_size=8,
        transform={"a": shift(0), "b": shift(100)},
    )
    batch = pipe[0]
    assert np.all((batch["x"] >= 100) == (batch["task"] == 1))


def test_a_zero_weight_leaves_a_task_out():
    pipe = data.mixture([rows(4), rows(4)], batch_size=4, weights=[0, 1])
    assert {int(t) for i in range(5) for t in pipe[i]["task"]} == {1}


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [np.nan, 1]])
def test_weights_that_are_no_proportions_are_refused(weights):
    with pytest.raises(ValueError, match="are not proportions"):
        data.mixture([rows(4), rows(4)], batch_size=4, weights=weights)


def test_values_for_other_tasks_are_refused():
    with pytest.raises(ValueError, match="values are for .*'c'.*tasks are"):
        data.mixture({"a": rows(4)}, batch_size=2, weights={"c": 1.0})
    with pytest.raises(ValueError, match="3 values for 2 tasks"):
        data.mixture([rows(4), rows(4)], batch_size=2, weights=[1, 1, 1])
    with pytest.raises(ValueError, match="no sources"):
        data.mixture({}, batch_size=2)


def test_lockstep_stacks_one_batch_of_every_task():
    pipe = data.lockstep([rows(5), rows(9, 100)], batch_size=3, seed=4)
    batch = pipe[7]
    assert batch["x"].shape == (2, 3)
    assert np.all(batch["x"][0] < 100) and np.all(batch["x"][1] >= 100)
    x = np.stack([pipe[i]["x"] for i in range(15)])
    assert collections.Counter(x[:, 0].ravel()) == dict.fromkeys(range(5), 9)
    assert collections.Counter(x[:, 1].ravel()) == dict.fromkeys(range(100, 109), 5)


def test_random_transform_differs_by_row_and_epoch_and_repeats_with_the_seed():
    def jitter(element, rng):
        return {"x": element["x"], "noise": rng.standard_normal()}

    def noise():
        pipe = data.pipeline(
            rows(6), batch_size=6, seed=2, random_transform=jitter, shuffle=False
        )
        return np.stack([pipe[i]["noise"] for i in range(2)])

    first = noise()
    assert len(np.unique(first)) == 12
    np.testing.assert_array_equal(first, noise())


def test_to_arrays():
    def double(element):
        return {"x": element["x"] * 2}

    found = data.to_arrays(rows(5), double, limit=3)
    assert list(found) == ["x"]
    np.testing.assert_array_equal(found["x"], [0, 2, 4])
    np.testing.assert_array_equal(data.to_arrays(rows(2))["x"], [0, 1])
    assert len(data.to_arrays(rows(2), limit=9)["x"]) == 2
    with pytest.raises(ValueError, match="no rows"):
        data.to_arrays(rows(2), limit=0)


def test_array_source_refuses_ragged_arrays():
    with pytest.raises(ValueError, match=r"'a': 2, 'b': 3"):
        data.ArraySource({"a": np.zeros(2), "b": np.zeros(3)})


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "seed": -1}])
def test_numbers_out_of_range(options):
    source = data.ArraySource({"x": np.zeros((4, 2))})
    with pytest.raises(ValueError, match="pipeline: .*wants at least"):
        data.pipeline(source, **options)
    with pytest.raises(ValueError, match="mixture: .*wants at least"):
        data.mixture({"a": source}, **options)
