import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import zoo

pytestmark = pytest.mark.fast


def _task(rows, width=4, identity="heads"):
    splits = {"train": {"x": np.asarray(rows, np.float32)}}
    return zoo.make_task("t", splits, jnp.eye(2, 3), width, identity=identity)


def test_heads_are_padded_to_the_widest_task():
    head = _task([1.0]).head
    assert head["prototypes"].shape == (4, 3)
    assert head["active"].tolist() == [True, True, False, False]


def test_digest_follows_rows_and_head():
    assert _task([1.0]).digests == _task([1.0]).digests
    assert _task([1.0]).digests != _task([2.0]).digests
    assert _task([1.0]).digests != _task([1.0], identity="others").digests


def test_a_task_is_the_same_in_a_suite_of_wider_tasks():
    assert _task([1.0]).digests == _task([1.0], width=5).digests


@pytest.mark.parametrize("names", [(), ("digits", "digits")])
def test_task_lists_are_checked(tiny_suite, quiet, names):
    with pytest.raises(ValueError, match="at least one task, each once"):
        zoo.load_tasks(
            tiny_suite[0], names, train=1, validation=1, test=1, progress=quiet
        )
