import gc
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtl_jax.io.checkpoint import Checkpointer, checksums


class Point(NamedTuple):
    x: jax.Array
    y: None


def tree(seed=0):
    key = jax.random.key(seed)
    params = {"kernel": jax.random.normal(key, (64, 32)), "skip": None}
    return {
        "params": params,
        "low": [jax.random.normal(key, (5,), jnp.bfloat16), jnp.arange(3)],
        "flag": jnp.asarray(True),
        "empty": jnp.zeros((0, 2)),
        "point": Point(jnp.float32(seed), None),
        "adam": optax.adam(1e-3).init(params),
        "key": jax.random.key(seed + 1),
    }


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def like(t):
    return jax.eval_shape(lambda: t)


def data_file(folder):
    """The largest data file of a checkpoint."""
    files = [path for path in folder.rglob("*") if path.is_file() and "d" in path.parts]
    return max(files, key=lambda path: path.stat().st_size)


def test_round_trip_keeps_every_bit_and_the_meta_data(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, tree(), {"data": {"next_index": 7}, "seed": None})
        checkpoints.wait()
        assert_equal(checkpoints.restore(like(tree())), tree())
        assert checkpoints.meta(3) == {"data": {"next_index": 7}, "seed": None}
    with Checkpointer(tmp_path) as reopened:
        assert reopened.latest() == 3
        assert_equal(reopened.restore(like(tree()), 3), tree())


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {"w": jnp.zeros((256, 256))}
    with Checkpointer(tmp_path, keep=9) as checkpoints:
        for index in range(5):
            checkpoints.save(index, state)
            state = step(state)
        checkpoints.wait()
        for index in range(5):
            found = checkpoints.restore(like(state), index)["w"]
            np.testing.assert_array_equal(found, np.full((256, 256), index))


def test_newest_are_kept_and_existing_steps_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 5):
            checkpoints.save(step, {"w": jnp.full(2, step)})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5]
        checkpoints.save(5, {"w": jnp.zeros(2, jnp.int32)})
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((2,), jnp.int32)})
        np.testing.assert_array_equal(found["w"], [5, 5])


def test_restored_on_another_layout(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    x = jnp.arange(16.0).reshape(8, 2)
    split = NamedSharding(mesh, P("data"))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": x})
        checkpoints.wait()
        wanted = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
        found = checkpoints.restore({"x": wanted})["x"]
    assert found.sharding == split
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"flag": jnp.zeros(2, bool)},
            r"'flag' is bool\[2\] here, bool\[\] in checkpoint",
        ),
        (
            lambda t: t | {"low": [t["low"][0].astype(jnp.float32), t["low"][1]]},
            r"'low/0' is float32\[5\] here, bfloat16\[5\] in checkpoint",
        ),
        (
            lambda t: t | {"more": jnp.ones(1)},
            "'more' is float32.*but not in checkpoint",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != "flag"},
            "'flag' is in checkpoint .*but not here",
        ),
    ],
)
def test_other_trees_are_refused_by_name(tmp_path, change, message):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, tree())
        checkpoints.wait()
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(like(change(tree())))


@pytest.fixture
def collected():
    """Reads that Orbax gave up raise when they are collected: here, not elsewhere."""
    yield
    gc.collect()


abandons_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@abandons_reads
@pytest.mark.usefixtures("collected")
def test_cut_data_are_damaged_and_the_one_before_still_reads(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1))
        checkpoints.save(2, tree(2))
        checkpoints.wait()
        file = data_file(tmp_path / "2")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(
            ValueError, match=r"checkpoint .*/2 is damaged at 'params/kernel'.*delete"
        ):
            checkpoints.restore(like(tree()))
        assert_equal(checkpoints.restore(like(tree()), 1), tree(1))
        shutil.rmtree(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


@abandons_reads
@pytest.mark.usefixtures("collected")
def test_one_changed_bit_is_noticed(tmp_path):
    value = {"w": jax.random.normal(jax.random.key(0), (4000,))}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, value)
        checkpoints.wait()
        file = data_file(tmp_path / "0")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged.*'w'"):
            checkpoints.restore(like(value))


def test_missing_manifest(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"w": jnp.ones(2)})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "0" / "meta")
        with pytest.raises(ValueError, match="damaged: its manifest cannot be read"):
            checkpoints.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_unfinished_checkpoints_do_not_exist(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(4, {"w": jnp.ones(2)})
    partial = tmp_path / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "4", partial)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest() == 4


def test_nothing_to_restore(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(ValueError, match=r"no checkpoint in .*found steps \[\]"):
            checkpoints.restore({})
        with pytest.raises(ValueError, match="no checkpoint 3 in"):
            checkpoints.restore({}, 3)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep wants at least 1, found 0"):
        Checkpointer(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        Checkpointer(tmp_path / "file" / "x")


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "int32", "uint16", "bool", "complex64"]
)
def test_checksums_notice_one_bit_and_exchanged_elements(dtype):
    x = jnp.asarray(np.arange(12).reshape(3, 4) % 2, dtype)
    base = checksums({"x": x})
    for changed in (x.at[1, 2].set(x[1, 1]), x.at[1, 1].set(x[1, 2]), x[:, ::-1]):
        assert checksums({"x": changed}) != base
    assert checksums({"x": jnp.array(x)}) == base


def test_checksums_do_not_depend_on_the_layout():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    x = jax.random.normal(jax.random.key(0), (16, 3))
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert checksums({"x": split}) == checksums({"x": x})
