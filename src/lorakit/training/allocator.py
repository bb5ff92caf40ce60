"""Memory that a step on a CPU has freed, kept for the next one.

glibc gives large blocks back to the system as soon as they are freed, and asks for them again in the next step; each
of their pages then costs an interrupt before it can be written. Where memory is ample the process keeps them instead.
Nothing is done with another C library, or where the user has set the allocator up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# mallopt(3): what is mapped on its own, when the end of the heap is given back, by how much it grows.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
_AFTERWARDS = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 128 * 2**10}
"""Where glibc's own adjustment ends once large blocks have been freed; it cannot be switched on again."""

_WITHIN = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: 64 * 2**20}


@contextlib.contextmanager
def keeping_freed_memory(wanted: bool = True) -> Iterator[bool]:
    """Let this process keep what it frees within the block; afterwards what is free goes back to the system.

    Yields:
        Whether it is so.
    """
    libc = glibc(os.environ) if wanted else None
    if libc is None or not all(libc.mallopt(name, value) for name, value in _WITHIN.items()):
        yield False
        return
    try:
        yield True
    finally:
        for name, value in _AFTERWARDS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def glibc(environment: Mapping[str, str]) -> Any:
    """Return glibc where the process uses its allocator as it comes, else None.

    Args:
        environment: the variables that would set it up.
    """
    set_up = any(name.startswith("MALLOC_") for name in environment) or "malloc" in environment.get(
        "GLIBC_TUNABLES", ""
    )
    if set_up or environment.get("LD_PRELOAD") or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    known = all(hasattr(libc, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return libc if known else None
