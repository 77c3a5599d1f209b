import functools
import pathlib

import pytest

from mtl_jax import aggregation, multitask
from mtl_jax.multitask import provenance

pytestmark = pytest.mark.fast


def test_a_changed_source_file_gives_another_digest(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/a.py", "deep/er/b.py", "one.py", "other.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    parts = ("deep", "one.py")
    seen = {provenance.source_digest(tmp_path, parts)}
    assert seen == {provenance.source_digest(tmp_path, parts[::-1])}
    (tmp_path / "other.py").write_text("x = 1\n")
    (tmp_path / "deep" / "notes.txt").write_text("x = 1\n")
    assert seen == {provenance.source_digest(tmp_path, parts)}
    for name in ("one.py", "deep/er/b.py"):
        (tmp_path / name).write_text("x = 1\n")
        seen.add(provenance.source_digest(tmp_path, parts))
    (tmp_path / "deep" / "b.py").write_text("x = 1\n")
    seen.add(provenance.source_digest(tmp_path, parts))
    (tmp_path / "deep" / "b.py").rename(tmp_path / "deep" / "c.py")
    seen.add(provenance.source_digest(tmp_path, parts))
    assert len(seen) == 5
    with pytest.raises(ValueError, match="no Python source at .*gone"):
        provenance.source_digest(tmp_path, ("gone",))


def test_the_package_is_read_once(monkeypatch):
    first = provenance.package_digest()
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda self: b"")
    assert provenance.package_digest() == first
    provenance.package_digest.cache_clear()
    try:
        assert provenance.package_digest() != first
    finally:
        provenance.package_digest.cache_clear()


def test_libraries_count(monkeypatch):
    provenance.package_digest.cache_clear()
    first = provenance.package_digest()
    provenance.package_digest.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    try:
        assert provenance.package_digest() != first
    finally:
        provenance.package_digest.cache_clear()


def test_functions_carry_their_file():
    def mine():
        return aggregation.mean()

    here = provenance.function_digest(mine)
    assert here and here == provenance.function_digest(functools.partial(mine))
    assert here != provenance.function_digest(aggregation.mean)
    assert provenance.function_digest(len) == ""
    about = {"mine": 1}
    assert multitask.aggregated("a", mine, about=about).code == here
    total = multitask.regularised("a", lambda *parts: None, about)
    assert total.code == here
