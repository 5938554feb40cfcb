"""Memory that a step frees and needs again stays with the process, on Linux.

Rebuilt layers are born and dropped hundreds of times a forward pass. glibc gives the free end of its heap back to the
system whenever it grows beyond twice the largest block that was freed so far, 128 KiB at first, and then every page of
the next layer is a page fault.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_BLOCK = 32 << 20  # the most that glibc lets these limits grow to by itself
SETTLED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # by the environment


def keep_freed_memory() -> bool:
    """Let this process keep up to 64 MiB of freed memory in place of giving it back; whether that was done.

    SmolLM2-135M on two cores, where glibc's own limits were still low: two forward passes of a quantized model 1.6 s
    before and 1.2 s after. The limits are those that glibc comes to by itself once a block of 32 MiB was freed. Other
    C libraries, and limits that the environment sets, are left alone. The `qzo` commands call this themselves; a loop
    of your own may, before the first step.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTLED):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_BLOCK))
