"""What a run tells whoever watches it. The command line draws a bar from it; the library is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.records import Choice, Evaluation, Sample


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


class Observer:
    """Watches a run; every method may be overridden, none has to be."""

    def stage(self, text: str) -> None:
        """A stage of the run begins, such as 'loading the model'."""

    def choices(self, choices: Sequence[Choice]) -> None:
        """All settings are decided."""

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
