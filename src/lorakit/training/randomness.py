"""The random generators that a training may draw from: torch's, Python's and NumPy's, as plain data."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Device = torch.device

PROCESS_STRIDE = 1_000_003
"""Between the seeds of two processes, so that each draws its own masks."""


@dataclass(frozen=True)
class Randomness:
    """The state of every generator at one moment.

    Attributes:
        torch: of the CPU's generator; ``cuda`` of the device's, or None on a CPU.
        python: of the module ``random``.
        numpy: of NumPy's global generator.
    """

    torch: Tensor
    cuda: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: Device) -> Randomness:
        """Take all states as they are; microseconds."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self, device: Device) -> None:
        """Set all generators to these states."""
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def same(self, other: Randomness) -> bool:
        """Tell whether nothing was drawn between two moments."""
        now, then = self.tensors(), other.tensors()
        return all(torch.equal(now[name], then[name]) for name in now)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states as byte tensors by name."""
        kind, keys, *rest = self.numpy
        found = {
            "torch": self.torch,
            "python": _as_bytes(self.python),
            "numpy": _as_bytes([kind, keys.tolist(), *rest]),
        }
        return found if self.cuda is None else {**found, "cuda": self.cuda}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Randomness:
        """Read what :meth:`tensors` returned."""
        version, numbers, gauss = _from_bytes(tensors["python"])
        kind, keys, *rest = _from_bytes(tensors["numpy"])
        numpy = (kind, np.array(keys, dtype=np.uint32), *rest)
        return cls(tensors["torch"], tensors.get("cuda"), (version, tuple(numbers), gauss), numpy)


@contextlib.contextmanager
def own_generators(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Within the block the generators may be drawn from, seeded first if asked; the caller's states come back."""
    before = Randomness.now(device)
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        before.restore(device)


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
