import os
import types

import numpy as np
import pytest

from mtl_jax.checkpoints import _target
from mtl_jax.checkpoints.source import TensorSpec
from mtl_jax.checkpoints.writer import CheckpointWriter

pytestmark = pytest.mark.fast

SPECS = {"w": TensorSpec((4,), np.dtype(np.float32))}


def both(out, match, error=ValueError, **options):
    """The check and the writer refuse the same; the check makes nothing."""
    options = {"plan": "p", **options}
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=match):
        _target.check_target(out, SPECS, **options)
    assert sorted(out.parent.rglob("*")) == before
    with pytest.raises(error, match=match):
        CheckpointWriter(out, SPECS, **options)


def test_what_would_be_lost(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, plan="p") as writer:
        writer.write("w", 0, np.zeros(4, np.float32))
        writer.finish({"README.md": b"x"})
    both(out, "holds a checkpoint")
    (out / "model.safetensors").unlink()
    both(out, "holds README.md, which would be replaced", beside=["README.md"])
    _target.check_target(out, SPECS, plan="p", beside=["config.json"])
    _target.check_target(out, SPECS, plan="p", beside=["README.md"], overwrite=True)


def test_an_unfinished_write(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, SPECS, plan="p") as writer:
        both(out, "another process is writing there")
        writer.write("w", 0, np.zeros(4, np.float32))
    both(out, "unfinished write of another plan", plan="q")
    both(out, "unfinished write of another plan", shard_bytes=1, metadata={"a": "b"})
    _target.check_target(out, SPECS, plan="q", overwrite=True)
    _target.check_target(out, SPECS, plan="p", beside=["README.md"])
    with CheckpointWriter(out, SPECS, plan="p") as writer:
        assert writer.done == {"w"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    both(tmp_path / "file", "cannot write", OSError)
    both(tmp_path / "file" / "out", "cannot write", OSError)
    with pytest.raises(ValueError, match="wants a local folder"):
        _target.check_target("gs://bucket/out", SPECS, plan="p")


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
def test_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    both(tmp_path / "closed" / "out", "ermission", PermissionError)


def test_room(tmp_path, monkeypatch):
    free = types.SimpleNamespace(free=10)
    monkeypatch.setattr(_target.shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match="no room for"):
        _target.check_target(tmp_path / "out", SPECS, plan="p")
    assert not list(tmp_path.iterdir())


def test_inputs_are_apart(tmp_path):
    folder, file = tmp_path / "in", tmp_path / "in" / "model.safetensors"
    folder.mkdir()
    file.touch()
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, file, tmp_path / "link"):
        with pytest.raises(ValueError, match="merge: .* is read from"):
            _target.check_apart("merge", tmp_path / "in", [tmp_path, path])
    _target.check_apart("merge", tmp_path / "out", [folder, file])
