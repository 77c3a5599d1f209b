"""The choice of a scale: grids, constraints, ties."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mtl_jax import merging

pytestmark = pytest.mark.fast


def test_finds_the_best_of_the_grid_and_calls_once_per_scale():
    calls = []
    found = merging.scale_search(
        lambda s: calls.append(s) or -abs(s - 0.35), np.linspace(0, 1, 21)
    )
    assert found.scale == pytest.approx(0.35)
    assert len(calls) == len(set(calls)) == 21


def test_of_equal_values_the_smallest_scale_wins():
    assert merging.scale_search(lambda s: 1.0, [1.0, 0.5]).scale == 0.0


@hypothesis.given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_negation_never_breaks_the_control(values, control):
    table = {0.0: (0.5, control)}
    table |= {i / 8: v for i, v in enumerate(values, 1)}
    found = merging.scale_search(table.get, list(table), "min", constraint=0.95)
    admissible = {s for s, v in table.items() if v[1] >= 0.95 * control} | {0.0}
    assert found.scale in admissible
    assert found.value == min(table[s][0] for s in admissible)


def test_zero_is_chosen_when_every_other_scale_breaks_the_control():
    found = merging.scale_search(
        lambda s: (1 - s, 1 - s), [0.5, 1.0], "min", constraint=0.95
    )
    assert found.scale == 0.0
    assert [t.admissible for t in found.trials] == [True, False, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merging.scale_search(float, [1], "best"), "objective is 'best'"),
        (
            lambda: merging.scale_search(lambda s: float("nan"), []),
            "value at scale 0.0",
        ),
        (
            lambda: merging.scale_search(float, [1], constraint=0.9),
            "returns .value, co",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=f"scale_search: .*{message}"):
        call()


def test_normalised_accuracy():
    assert merging.normalised_accuracy([0.45, 0.8], [0.9, 0.8]) == 0.75
    with pytest.raises(ValueError, match="not positive"):
        merging.normalised_accuracy([0.5], [0.0])
    with pytest.raises(ValueError, match="one of each per task"):
        merging.normalised_accuracy([0.5], [0.5, 0.5])


@pytest.mark.parametrize("grid", [[float("nan")], [0.1, float("inf")], ["x"], [None]])
def test_a_grid_of_numbers(grid):
    with pytest.raises(ValueError, match="scale_search: .*wanted"):
        merging.scale_search(lambda scale: 1.0, grid)


def test_accuracies_are_numbers():
    with pytest.raises(ValueError, match="normalised_accuracy: accuracies are"):
        merging.normalised_accuracy([float("nan")], [0.5])
