"""The same step for real: what memory it takes, and how long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorakit.adapters import attach
from lorakit.methods import Method
from lorakit.training.costs.simulate import ADAPTER, InPlace, in_training_mode
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.memory import peak_bytes
from lorakit.training.plan import Plan
from lorakit.training.randomness import own_generators
from lorakit.training.stepper import Stepper
from lorakit.training.tasks import Task


@dataclass(frozen=True)
class Probe:
    """What two real steps on the longest batch have shown; the first gives the optimizer its state.

    Attributes:
        peak_bytes: tensor bytes above the loaded base at the peak of both.
        seconds: of the second step.
        tokens: input tokens in it.
    """

    peak_bytes: int
    seconds: float
    tokens: int


def probe(
    model: nn.Module,
    task: Task,
    collator: Collator,
    method: Method | None,
    attaching: dict[str, Any],
    plan: Plan,
    rows: Sequence[EncodedRow],
) -> Probe:
    """Attach, take two steps on ``rows``, and take the adapter off again.

    The base is as before, unless ``method`` is None: then its own parameters have been trained.

    Raises:
        TrainingError: memory ran out, or the loss is not finite.
    """
    device = next(model.parameters()).device
    taken: list[float] = []

    def run() -> None:
        blank = method is not None and method.looks() is not None  # what it would see changes no cost
        handle: Any = InPlace(model) if method is None else attach(model, method, blank=blank, **attaching)
        try:
            stepper = Stepper(handle, ADAPTER, task, collator, replace(plan, num_steps=2))
            with in_training_mode(model, plan):
                for _ in range(2):
                    begun = time.perf_counter()
                    stepper.step(rows)
                    taken.append(time.perf_counter() - begun)
        finally:
            if method is not None:
                handle.detach()

    with own_generators(device, plan.seed):
        peak = peak_bytes(run, device)
    return Probe(peak, taken[-1], sum(len(row.input_ids) for row in rows))
