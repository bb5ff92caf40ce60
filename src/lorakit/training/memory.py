"""How much tensor memory a step takes above what was there before."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Count the bytes of storages that are made and alive within the block.

    Attributes:
        now: bytes alive at this moment.
        peak: the most at any moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """Take tensors as given: they count for nothing, also when an operation returns them."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count new storages among its results."""
        self.ignore((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage(), leaf.untyped_storage().nbytes())
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage that is not known yet, until it is freed (another may have its address then)."""
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Run ``action`` and return the tensor bytes at its peak above those at its start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    memory = TensorMemory()
    with memory:
        action()
    return memory.peak


def machine_bytes() -> int | None:
    """Return the machine's memory in bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that new tensors can have on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return machine_bytes()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else machine_bytes()
