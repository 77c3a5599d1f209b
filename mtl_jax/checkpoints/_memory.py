"""How freed memory is kept."""

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Of `malloc.h`.
_KEPT = 256 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Lets the C library reuse the memory of large temporaries, where it is glibc.

    By default it returns arrays of some megabytes to the system as they are freed, and
    every chunk would fault the same pages in again: up to half of the time of a merge.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _KEPT)
