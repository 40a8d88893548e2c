"""What the C library does with memory that is freed: keep it, for what is computed next."""

from __future__ import annotations

import ctypes
import functools
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for them (malloc.h of glibc)
KEPT = 2**31 - 1  # bytes at the end of the heap that are not given back: the most that it takes
LARGEST, LARGEST_OF_OLD = 2**30, 2**25  # bytes of a block that is kept; the most that older versions of glibc take


@functools.cache
def keep_freed() -> None:
    """From now on this process keeps the memory that it frees, where the C library is glibc; elsewhere nothing changes.

    A step frees its activations, and the next asks for as many. glibc gives blocks of megabytes back to the system in between,
    which hands out pages of zeros again: a tenth of the time of a small convolutional network's training went there. The most
    memory that a process has at once stays the same, but for gaps between blocks.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, LARGEST_OF_OLD)
        mallopt(TRIM_THRESHOLD, KEPT)
