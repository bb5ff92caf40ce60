"""Who holds the memory of a step: every storage has a label, and a peak is the sum of those alive at one moment.

A label is often known later than its storage: a gradient is one only when it has arrived at its parameter. So the
storages' births and deaths are written down, and the peak is found at the end, when all labels are known.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lorakit.training.memory import TensorMemory

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
PHASES = ("forward", "loss", "backward", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment, by what they are for.

    Attributes:
        weights: the base's parameters and buffers.
        adapter: the parameters that are trained, where they are not the base's own.
        gradients: those that have arrived at their parameters.
        optimizer: its state.
        activations: everything else: what the backward pass needs, and what operations take for a moment.
        logits: tensors with one number per word or class, the loss's copies of them among these.
    """

    weights: int = 0
    adapter: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def above_weights(self) -> int:
        """All parts but the loaded base: what a probe measures."""
        return self.total - self.weights


@dataclass(frozen=True)
class Peaks:
    """The highest moment of each phase of a step.

    Attributes:
        forward: until there are logits.
        loss: the logits, the loss and the first half of the backward pass; activations are at their most there.
        backward: the second half of the backward pass, where gradients are.
        update: clipping and the optimizer's step.
    """

    forward: Memory
    loss: Memory
    backward: Memory
    update: Memory

    @property
    def highest(self) -> Memory:
        """The peak of the step."""
        return max((self.forward, self.loss, self.backward, self.update), key=lambda memory: memory.total)

    def extended(self, other: Peaks, factor: float) -> Peaks:
        """Go on along the line from here through ``other``: ``self + factor * (other - self)``."""
        return Peaks(**{phase: _along(getattr(self, phase), getattr(other, phase), factor) for phase in PHASES})


def _along(first: Memory, second: Memory, factor: float) -> Memory:
    values = {part: (getattr(first, part), getattr(second, part)) for part in PARTS}
    return Memory(**{part: round(a + factor * (b - a)) for part, (a, b) in values.items()})


class Ledger(TensorMemory):  # type: ignore[no-untyped-call]
    """Write down when storages come and go, and what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, bool]] = []
        self._sizes: list[int] = []
        self._labels: list[str] = []
        self._numbers: dict[int, int] = {}
        self._phases: list[tuple[int, str]] = []
        self.label = "activations"

    @property
    def num_events(self) -> int:
        """Births and deaths so far."""
        return len(self._events)

    def begin(self, phase: str, place: int | None = None) -> None:
        """Enter a phase of the step, now or, by the number of events, at a place before."""
        self._phases.append((self.num_events if place is None else place, phase))

    @property
    def num_storages(self) -> int:
        """Storages so far."""
        return len(self._sizes)

    def name(self, tensors: Any, label: str, since: int = 0) -> None:
        """Say what storages are for, for all of their life; those of the first ``since`` keep their label."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                number = self._numbers.get(leaf.untyped_storage()._cdata, -1)
                if number >= since:
                    self._labels[number] = label

    def peaks(self, weights: int) -> Peaks:
        """Return the highest moment of each phase.

        Args:
            weights: bytes of the base, which was there before.
        """
        starts = {place: phase for place, phase in self._phases}
        now = dict.fromkeys(PARTS, 0) | {"weights": weights}
        best: dict[str, Mapping[str, int]] = {}
        phase, most = "", -1
        for i, (number, made) in enumerate([*self._events, (-1, True)]):
            if i in starts:
                phase, most = starts[i], -1
            # What is alive when a phase begins counts for it as well.
            if phase and (total := sum(now.values())) > most:
                most, best[phase] = total, dict(now)
            if number >= 0:
                now[self._labels[number]] += self._sizes[number] if made else -self._sizes[number]
        return Peaks(**{phase: Memory(**best.get(phase, {})) for phase in PHASES})

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._numbers:
            return
        number = self._numbers[key] = len(self._sizes)
        self._sizes.append(size)
        self._labels.append(self.label)
        self._events.append((number, True))
        weakref.finalize(storage, self._gone, key, number).atexit = False

    def _gone(self, key: int, size: int) -> None:
        """Note the death of the storage; ``size`` is its number here."""
        if self._numbers.get(key) == size:
            del self._numbers[key]
        self._events.append((size, False))
