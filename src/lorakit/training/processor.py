"""What the processor gives this process: cores, the share of them that a container leaves it, and a unit for bf16.

torch starts a thread for each core that it may run on. A container's share of them (``docker --cpus 4``, a limit in
Kubernetes) is another thing, which torch does not ask for: 64 threads on a share of 4 cores stand still for most of
every period of the scheduler and wait for each other in between. Only :func:`bf16_unit` imports torch, so that the
number of threads can be set before it is loaded.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_VARIABLE = "OMP_NUM_THREADS"  # what torch, and what it calls for products, reads when it is loaded


@dataclass(frozen=True)
class Cores:
    """What this process can compute on.

    Attributes:
        allowed: cores that it may run on.
        share: cores' worth of time that its container gives it, which may be a fraction; None without a limit.
    """

    allowed: int
    share: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once: the share is rounded up, so that none of it is left."""
        return self.allowed if self.share is None else max(1, min(self.allowed, math.ceil(self.share)))

    @property
    def is_shared(self) -> bool:
        """Whether the container gives less than the cores that it shows."""
        return self.usable < self.allowed


def cores(root: Path = Path("/")) -> Cores:
    """Look up what this process has.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Cores(allowed, _share(root))


def limit_threads(environment: MutableMapping[str, str], found: Cores) -> None:
    """Let torch, loaded after this, start as many threads as can run; what the user has set stays.

    Args:
        environment: the environment's variables; changed.
        found: what :func:`cores` found.
    """
    if found.is_shared:
        environment.setdefault(_VARIABLE, str(found.usable))


def in_words(num_threads: int, found: Cores) -> str:
    """Say how many threads there are, and what of a container's share.

    >>> in_words(4, Cores(64, 3.5))
    "4 threads: the container's share is 3.5 of 64 cores"
    """
    threads = f"{num_threads:,} thread{'' if num_threads == 1 else 's'}"
    if found.share is None or not found.is_shared:
        return threads
    share = f"the container's share is {found.share:g} of {found.allowed:,} cores"
    more = f"; torch.set_num_threads({found.usable}) uses no more" if num_threads > found.usable else ""
    return f"{threads}: {share}{more}"


def bf16_unit() -> str | None:
    """Return what the processor multiplies bf16 by, measured to be faster than fp32 and used by torch; else None.

    That is AMX; what AVX-512 BF16 gives alone has not been measured, so it does not count.
    """
    import torch

    found = torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()  # type: ignore[no-untyped-call]
    return "AMX" if found else None


def _share(root: Path) -> float | None:
    """Return the smallest limit of this process's control groups (Linux) in cores, None without one."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            inside = str(group).lstrip("/")
            if not controllers:  # version 2: one tree for all
                limits += _limit(_words(root / "sys/fs/cgroup" / inside / "cpu.max"))
            elif "cpu" in controllers.split(","):
                folder = root / "sys/fs/cgroup/cpu" / inside
                limits += _limit([*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")])
    return min(limits, default=None)


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:  # the root of the tree has none, and a group above a container's own is not shown
        return []


def _limit(words: list[str]) -> list[float]:
    """Return the cores that quota and period give; nothing where there is no limit ('max', -1)."""
    if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) == 0:
        return []
    return [int(words[0]) / int(words[1])]
