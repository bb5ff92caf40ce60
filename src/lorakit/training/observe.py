"""What a run tells whoever watches it. The command line draws a bar from it; the library is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.records import Choice, Evaluation, Planned, Sample


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: from 1; ``num_steps`` is where the run ends.
        epoch: passes over the data so far.
        loss: mean over the step's rows or supervised tokens, nats.
        lr: the first parameter group's learning rate.
        grad_norm: before clipping.
        tokens_per_s: input tokens per second so far, evaluation left out.
        seconds: training time so far.
    """

    step: int
    num_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True)
class About:
    """What a run trains on what, for a header.

    Attributes:
        task: its name.
        model: the base as it was named; ``num_base`` its numbers, ``dtype`` and ``device`` where and as what they are.
        method: the method's name and settings, as JSON; ``targets`` the names of the layers it updates.
        num_trainable: numbers that are trained; ``num_head`` those of them in modules trained in full.
        num_rows, num_held: rows to train on and to validate on; ``num_tokens`` input tokens of the former.
        batch_size, micro_batch: rows of a step, and at a time in memory.
        num_steps, epochs: of the run.
        folder: the run folder; None if there is none.
        planned: what it is expected to take; None if that was not estimated.
    """

    task: str
    model: str
    num_base: int
    dtype: str
    device: str
    method: dict[str, Any]
    targets: tuple[str, ...]
    num_trainable: int
    num_head: int
    num_rows: int
    num_held: int
    num_tokens: int
    batch_size: int
    micro_batch: int
    num_steps: int
    epochs: float
    folder: str | None
    planned: Planned | None


class Observer:
    """Watches a run; every method may be overridden, none has to be."""

    def stage(self, text: str) -> None:
        """A stage of the run begins, such as 'loading the model'."""

    def choices(self, choices: Sequence[Choice]) -> None:
        """All settings are decided."""

    def begins(self, about: About) -> None:
        """Everything is known and measured: the first step, or the next one of a resumed run, follows."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def step(self, step: Step) -> None:
        """An optimizer step is done."""

    def evaluation(self, step: int, epoch: float, evaluation: Evaluation, best: bool) -> None:
        """The validation rows were measured; ``best`` if no earlier measurement was better."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """A few held-out rows were answered, with the base's answers beside."""

    def resumes(self, step: int, num_steps: int) -> None:
        """The run goes on after ``step``."""

    def checkpointed(self, step: int, place: str) -> None:
        """A checkpoint of ``step`` is on the disk: the run can be resumed from there."""

    def training_ends(self) -> None:
        """The last step is done."""
