import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.checkpoints.source import open_source
from mtl_jax.io.checkpoint import Checkpointer

PARAMS = {
    "a.b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers": [np.ones(2, jnp.bfloat16), np.float32(3).reshape(())],
    "empty": np.zeros((0, 2), np.float32),
    "ids": {"k": np.arange(6, dtype=np.int32).reshape(2, 3)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(path) as checkpoints:
        older = jax.tree.map(np.zeros_like, PARAMS)
        for step, params in ((2, older), (10, PARAMS)):
            state = {
                "params": params,
                "key": jax.random.key(0),
                "step": jnp.int32(step),
            }
            checkpoints.save(step, jax.tree.map(jnp.asarray, state))
    return path


def test_parameters_of_the_newest_step(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    leaves = {
        "a.b": PARAMS["a.b"],
        "layers/0": PARAMS["layers"][0],
        "layers/1": PARAMS["layers"][1],
        "empty": PARAMS["empty"],
        "ids/k": PARAMS["ids"]["k"],
    }
    for path in (folder, folder / "10", folder.name):
        source = open_source(path)
        assert set(source) == set(leaves) and source.config is None
        for name, value in leaves.items():
            assert source.specs[name] == (value.shape, value.dtype)
            np.testing.assert_array_equal(source[name].whole(), value)
            flat = source[name].flat(1, 5)
            np.testing.assert_array_equal(flat, value.reshape(-1)[1:5])
    older = open_source(folder / "2")
    assert not older["a.b"].whole().any()
    assert older.fingerprint != open_source(folder).fingerprint


def test_a_tree_without_parameters_is_given_whole(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": jnp.arange(3), "y": {"params": jnp.ones(2)}})
    assert set(open_source(tmp_path)) == {"x", "y/params"}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(3), "key": jax.random.key(0)})
    with pytest.raises(ValueError, match="'key' is a random key"):
        open_source(tmp_path)


def test_damage_is_named(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder / "10", copy)
    manifest = copy / "meta/metadata"
    note = json.loads(manifest.read_text())
    note["sums"]["params/a.b"] += 1
    note["leaves"]["params/ids/k"] = ["int32", [3, 2]]
    manifest.write_text(json.dumps(note))
    source = open_source(copy)
    with pytest.raises(ValueError, match=r"'params/a\.b' has changed since"):
        source["a.b"].whole()
    with pytest.raises(ValueError, match=r"is int32\[2, 3\], its manifest says"):
        source["ids/k"].flat(0, 1)
    for path, _, files in os.walk(copy / "state"):
        for file in files:
            if os.path.basename(path) == "d":
                os.unlink(os.path.join(path, file))
    with pytest.raises(ValueError, match="cannot read 'params/layers/0'"):
        source["layers/0"].whole()
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="not written by"):
        open_source(copy)
