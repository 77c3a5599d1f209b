import jax.numpy as jnp
import pytest

from mtl_jax import zoo

pytestmark = pytest.mark.fast


def test_rows_have_unique_names():
    with pytest.raises(ValueError, match=r"unique names, found \['zero-shot'\] twice"):
        zoo.PostHoc(rows=(zoo.zero_shot(), zoo.individual(), zoo.zero_shot()))


def test_individual_and_zero_shot_are_the_ends():
    taus = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    row = zoo.individual()
    state = row.prepare(taus, {})
    assert row.delta(state, 1, 1.0)["w"].tolist() == [3.0, 4.0]
    shared = zoo.zero_shot()
    assert shared.scales == (0.0,)
    assert shared.delta(taus, {})["w"].shape == (2,)


def test_storage_counts_trained_weights_once_per_model():
    assert zoo.zero_shot().bits(8, 10, 3) == 32 * 13
    assert zoo.individual().bits(8, 10, 3) == 32 * 83


@pytest.mark.parametrize("grid", [(), (float("nan"), 1.0), (float("inf"),), ("a",)])
def test_grids_are_finite_numbers(grid):
    with pytest.raises(ValueError, match="row 'r': scales wants"):
        zoo.SharedModel(name="r", delta=lambda taus, chosen: taus, scales=grid)
    with pytest.raises(ValueError, match="row 'r': knobs wants"):
        zoo.TaskModels(
            name="r",
            prepare=lambda taus, chosen: taus,
            delta=lambda state, task, knob: state,
            knobs=grid,
        )


def test_a_fit_is_one_thing():
    with pytest.raises(ValueError, match="one of delta, task_delta and features"):
        zoo.Fit()
    with pytest.raises(ValueError, match="one of delta, task_delta and features"):
        zoo.Fit(delta={}, task_delta=lambda task: {})
    with pytest.raises(ValueError, match="wants both or none"):
        zoo.Fit(features=lambda params, inputs, task: inputs)
    with pytest.raises(ValueError, match="wants both or none"):
        zoo.Fit(delta={}, params={})
