"""How the process asks the operating system for memory."""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD = 1 << 30


def keep_freed_memory() -> None:
    """Let malloc use freed blocks again instead of giving them back to the system.

    By default glibc maps every large tensor afresh and the kernel clears its pages at first touch, which a CPU run
    does thousands of times a step. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
