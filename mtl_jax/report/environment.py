"""What a result was measured on, without naming the machine."""

import datetime
import os
import platform

__all__ = ["environment"]


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "unknown memory"
    return f"{size / 2**30:.0f} GiB"


def environment() -> dict[str, str]:
    """Versions, machine class, devices and time, as short strings.

    Returns:
      Keys "mtl_jax", "jax", "python", "machine", "devices" and "time".
    """
    import jax

    import mtl_jax

    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    now = datetime.datetime.now(datetime.UTC)
    return {
        "mtl_jax": mtl_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": (
            f"{platform.system()} {platform.machine()}, {cores} CPU cores, {_memory()}"
        ),
        "devices": f"{len(devices)} x {', '.join(kinds)}",
        "time": now.strftime("%Y-%m-%d %H:%M UTC"),
    }
