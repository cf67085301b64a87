"""The memory allocator on CPUs: let glibc keep what was freed for the next tensor.

As it comes, glibc gives every large block back to the system when it is freed. The next tensor then
gets pages that the system must first fill with zeros, which takes a third of the processor time of
a convolutional network.
"""

import ctypes
import os
import sys

# From glibc's malloc.h; see "man mallopt".
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
# Who sets one of these has a choice of their own.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold", "glibc.malloc.mmap_max")


def keep_freed_memory() -> bool:
    """Let this process keep freed memory, up to the most that it had at one time.

    Returns:
        Whether it does so now: not without glibc, with another allocator (``LD_PRELOAD``), or if
        the environment sets one of these limits.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in VARIABLES)
    if sys.platform != "linux" or chosen or any(name in tunables for name in TUNABLES):
        return False
    try:
        glibc, used = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
    except OSError:
        return False
    if not hasattr(glibc, "gnu_get_libc_version") or address(glibc.malloc) != address(used.malloc):
        return False
    # -1: never shrink the heap. Blocks of up to 1 GiB come from it; before 2.35, all do.
    never = glibc.mallopt(TRIM_THRESHOLD, -1)
    large = glibc.mallopt(MMAP_THRESHOLD, 2**30) or glibc.mallopt(MMAP_MAX, 0)
    return bool(never and large)


def address(function) -> int:
    """Where a C function is."""
    return ctypes.cast(function, ctypes.c_void_p).value
