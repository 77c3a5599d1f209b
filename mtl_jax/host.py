"""What the command line settles about this machine before work starts.

Only a process of our own may be set up like this: the library leaves the global
settings of JAX to whoever imports it.
"""

import contextlib
import gc
import importlib.util
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

__all__ = [
    "ends_on_sigterm",
    "imports",
    "keep_compiled_programs",
    "use_cpu_if_alone",
]

_ACCELERATORS = (  # Device files, as glob patterns under /dev.
    *("accel[0-9]*", "accel/accel*", "vfio/[0-9]*", "vfio/devices/*"),  # TPU
    *("nvidia*", "nvhost*", "kfd", "dxg"),  # NVIDIA, Jetson, AMD, WSL2
)
_MAX_BYTES = 2 << 30


def use_cpu_if_alone(devices: pathlib.Path = pathlib.Path("/dev")) -> None:
    """Keeps JAX from probing for a TPU (and complaining) where there is none.

    Call it before JAX is imported, which reads the variable. Nothing changes where
    any accelerator has a device file, or where JAX_PLATFORMS is set.

    Args:
      devices: the folder of device files.
    """
    if sys.platform != "linux" or "JAX_PLATFORMS" in os.environ:
        return
    if not any(next(devices.glob(p), None) for p in _ACCELERATORS):
        os.environ["JAX_PLATFORMS"] = "cpu"


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Imports without looking for garbage among what they make, then or at the end.

    It lives as long as the process. Nothing is kept that way where all modules were
    there already.
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if enabled:
            gc.enable()


def keep_compiled_programs() -> None:
    """Lets compiled programs outlive the process, unless the user chose a place.

    They go to `xla` in the package cache, up to 2 GiB; the least used go first.
    Without the package filelock JAX cannot keep to a size, and keeps them all.
    """
    import jax

    from mtl_jax.data import wheels

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(wheels.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if hasattr(jax.config, "jax_compilation_cache_max_size") and (
        importlib.util.find_spec("filelock")
    ):
        jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)


@contextlib.contextmanager
def ends_on_sigterm(name: str) -> Iterator[None]:
    """SIGTERM unwinds the program, says so in one line, and exits with code 143.

    Trainers that save checkpoints take the signal over while they run.

    Args:
      name: what is stopped, for the line on standard error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        del number, frame
        sys.stderr.write(f"{name}: stopped by SIGTERM; the same command goes on\n")
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
