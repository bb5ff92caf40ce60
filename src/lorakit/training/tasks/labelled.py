"""What tasks share whose model gives scores for labels: cross-entropy, and one pass over held-out rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.records import Evaluation
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.scores import bounded_batches
from lorakit.training.tasks.cross_entropy import summed_cross_entropy
from lorakit.training.tasks.shortcuts import NONE, Shortcuts
from lorakit.training.tasks.task import Task


class Labelled(Task):
    """A task whose loss is the cross-entropy of labels."""

    @abstractmethod
    def predictions(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE
    ) -> tuple[Tensor, Tensor]:
        """Return logits ``[units, labels]`` and the true labels ``[units]``."""

    @abstractmethod
    def scored(self, loss: float, num_rows: int, truth: Tensor, predicted: Tensor) -> Evaluation:
        """Turn the mean loss in nats and all true and predicted labels, ``[units]``, into scores."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE) -> Tensor:
        """Return the cross-entropy, see :class:`Task`."""
        return summed_cross_entropy(*self.predictions(model, batch, shortcuts))

    def measured(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the summed cross-entropy, the true labels and the likeliest ones, ``[units]`` both."""
        logits, truth = self.predictions(model, batch, shortcuts)
        return summed_cross_entropy(logits, truth), truth, logits.argmax(-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, rows: Sequence[EncodedRow], collate: Collator) -> Evaluation:
        """Measure, see :class:`Task`."""
        total = 0.0
        truths, guesses = [], []
        device = next(model.parameters()).device
        # With its mask the model computes what others are compared with.
        shortcuts = replace(self.shortcuts(model, collate, rows), without_mask=False)
        with evaluating(model):
            for numbers in bounded_batches(rows):
                batch = {key: value.to(device) for key, value in collate([rows[i] for i in numbers]).items()}
                loss, truth, predicted = self.measured(model, batch, shortcuts)
                total += float(loss)
                truths.append(truth.cpu())
                guesses.append(predicted.cpu())
        truth, predicted = torch.cat(truths), torch.cat(guesses)
        return self.scored(total / max(len(truth), 1), len(rows), truth, predicted)


def logits_of(model: nn.Module, inputs: Mapping[str, Any], num_dims: int, wanted: str) -> Tensor:
    """Run the model on everything but the labels, so that it computes no loss of its own, and return its logits.

    Raises:
        ModelError: there are none, or they have another number of dimensions than ``num_dims``.
    """
    logits = getattr(model(**{key: value for key, value in inputs.items() if key != "labels"}), "logits", None)
    kind = type(unwrapped(model)).__name__
    if not isinstance(logits, Tensor):
        raise ModelError(f"{kind} has no logits; this task needs {wanted}. Load the model with the task's head.")
    if logits.dim() != num_dims:
        raise ModelError(
            f"{kind} gives logits of shape {list(logits.shape)}; this task needs {wanted}. "
            "Load the model with the task's head, or give its name instead."
        )
    return logits


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside one that torch has compiled."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model
