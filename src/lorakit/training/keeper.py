"""``Keeper``: where a running loop leaves its metrics and its checkpoints. The plain one keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.training.plan import Progress


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, whole: from it the run goes on as if nothing had happened.

    Attributes:
        progress: where it stands.
        adapter: the adapter being trained.
        tensors: what the optimizer, the generators and the method remember, by name.
        scaler: the loss scaler's numbers; empty without one.
        best: the best adapter so far, where it is another one; only read, never written.
        metrics: the lines of metrics up to here; only read, never written.
    """

    progress: Progress
    adapter: AdapterState
    tensors: Mapping[str, Tensor]
    scaler: Mapping[str, float] = field(default_factory=dict)
    best: AdapterState | None = None
    metrics: tuple[Mapping[str, Any], ...] = ()


class Keeper:
    """Takes what a loop gives it.

    Attributes:
        saves: whether snapshots are wanted at all.
    """

    saves = False

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Return the lines of metrics that a new run begins with."""
        return ()

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics."""

    def save(self, snapshot: Snapshot) -> None:
        """Take a snapshot."""

    def backed_off(self, step: int) -> None:
        """Memory ran out in ``step``: from there the micro-batches are half as large."""


class SilentKeeper(Keeper):
    """Takes part in snapshots that the main process writes."""

    saves = True
