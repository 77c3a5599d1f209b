import gc
import importlib
import os
import signal
import sys

import jax
import pytest

from mtl_jax import host

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("file", [None, "vfio/vfio", "null"])
def test_cpu_is_chosen_where_nothing_else_is(tmp_path, monkeypatch, file):
    monkeypatch.setattr(sys, "platform", "linux")
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    host.use_cpu_if_alone(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    host.use_cpu_if_alone(tmp_path)
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    "file", ["accel1", "vfio/3", "vfio/devices/vfio0", "nvidia0", "dxg", "kfd"]
)
def test_accelerators_are_left_to_jax(tmp_path, monkeypatch, file):
    monkeypatch.setenv("JAX_PLATFORMS", "")  # Restored when the test ends.
    monkeypatch.delenv("JAX_PLATFORMS")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    host.use_cpu_if_alone(tmp_path)
    assert "JAX_PLATFORMS" not in os.environ


@pytest.fixture
def no_cache():
    """JAX as it starts, without a place for compiled programs."""
    names = [f"jax_compilation_cache_{name}" for name in ("dir", "max_size")]
    names.append("jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_up_to_a_size(no_cache, monkeypatch, tmp_path):
    pytest.importorskip("filelock")
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path))
    host.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    assert 0 < jax.config.jax_compilation_cache_max_size <= 4 << 30
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_place_the_user_chose_is_left_alone(no_cache):
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    size = jax.config.jax_compilation_cache_max_size
    host.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == "/somewhere"
    assert jax.config.jax_compilation_cache_max_size == size


def test_sigterm_unwinds_and_says_so(capsys):
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error, host.ends_on_sigterm("a run"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was not handled")
        finally:
            cleaned.append(True)
    assert error.value.code == 143 and cleaned
    assert "a run: stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_imports_are_not_searched_for_garbage(monkeypatch, tmp_path):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_of_this_test.py").write_text("import gc; on = gc.isenabled()")
    with host.imports():
        module = importlib.import_module("module_of_this_test")
    assert not module.on and frozen == [False] and gc.isenabled()
    with host.imports():
        importlib.import_module("module_of_this_test")
    assert frozen == [False]
    gc.disable()
    try:
        with host.imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    del sys.modules["module_of_this_test"]
