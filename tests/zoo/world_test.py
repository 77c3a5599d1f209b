import numpy as np
import pytest

from mtl_jax import data, zoo


def test_heads_are_unit_and_rows_are_apart(tiny_suite):
    encoder, tasks = tiny_suite
    assert [task.name for task in tasks] == ["task0", "task1", "task2"]
    for task in tasks:
        norms = np.linalg.norm(task.head["prototypes"], axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
        rows = [task.splits[s]["inputs"] for s in ("train", "validation", "test")]
        assert not np.array_equal(rows[0][:32], rows[1][:32])
        assert not np.array_equal(rows[1], rows[2])
    with pytest.raises(ValueError, match="no prototypes for the task 'digits'"):
        encoder.prototypes(data.get("digits"), {})


def test_the_normalisation_belongs_to_the_encoder_or_to_the_head(tiny_suite, quiet):
    encoder, tasks = tiny_suite
    found = encoder.features(encoder.params, tasks[0].splits["test"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    raw, _ = zoo.world(**TINY, unit_outputs=False, progress=quiet)
    assert raw.name != encoder.name
    norms = np.linalg.norm(raw.features(raw.params, tasks[0].splits["test"]), axis=1)
    assert norms.std() > 1e-3 * norms.mean()


def test_world_is_cached_by_its_settings(tiny_suite, quiet):
    encoder, _ = tiny_suite
    again, _ = zoo.world(**TINY, progress=quiet)
    assert again.name == encoder.name


TINY = {
    "tasks": 3,
    "hidden": 32,
    "pretrain_steps": 100,
    "sizes": (64, 32, 32),
    "seed": 0,
}


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": 0},
        {"hidden": 0},
        {"pretrain_steps": 0},
        {"sizes": (64, 32)},
        {"sizes": (64, 0, 32)},
        {"seed": -1},
    ],
)
def test_sizes_are_checked_first(options, quiet):
    with pytest.raises(ValueError, match="world: .*wants"):
        zoo.world(**options, progress=quiet)
