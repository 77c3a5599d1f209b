"""Parameters that are found again."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.zoo import keep

pytestmark = pytest.mark.fast
TREE = {"a": jnp.arange(3, dtype=jnp.float32), "b": {"c": jnp.ones((2, 2))}}


def test_what_is_there_is_not_made_again(tmp_path):
    calls = []

    def fit(workdir):
        calls.append(workdir)
        workdir.mkdir()
        (workdir / "step").write_text("1")
        return TREE, {"loss": [1.0, 0.5]}

    for _ in range(2):
        found, record = keep.kept("x-1", TREE, fit, folder=tmp_path / "deep")
        assert record == {"loss": [1.0, 0.5]}
        np.testing.assert_array_equal(found["a"], TREE["a"])
    assert len(calls) == 1 and not calls[0].exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x-1.safetensors"]


def test_what_was_stopped_finds_its_checkpoints(tmp_path):
    def stopped(workdir):
        workdir.mkdir()
        (workdir / "step").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep.kept("x", TREE, stopped, folder=tmp_path)

    def resumed(workdir):
        return TREE, {"step": (workdir / "step").read_text()}

    assert keep.kept("x", TREE, resumed, folder=tmp_path)[1] == {"step": "1"}


def test_files_of_other_shapes_are_refused(tmp_path):
    keep.kept("x", TREE, lambda workdir: (TREE, {}), folder=tmp_path)
    with pytest.raises(ValueError, match="'a'"):
        keep.kept("x", {**TREE, "a": jnp.ones(4)}, lambda w: 1 / 0, folder=tmp_path)


def test_addresses_tell_questions_apart():
    one = {"steps": 3, "settings": {"rate": 0.1, "names": ("a", "b")}}
    assert keep.address(one) == keep.address(dict(reversed(one.items())))
    others = [
        {**one, "steps": 4},
        {**one, "settings": {"rate": 0.2, "names": ("a", "b")}},
        {**one, "settings": {"rate": 0.1, "names": ("b", "a")}},
    ]
    assert len({keep.address(q) for q in (one, *others)}) == 4
