"""Measuring any model on encoded rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorakit.records import Evaluation
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.spec import TaskSpec


def evaluate(model: nn.Module, rows: Sequence[EncodedRow], collate: Collator, labels: Sequence[str] = ()) -> Evaluation:
    """Measure a model on rows; its training mode is as it was afterwards.

    Args:
        model: predicts classes or tokens.
        rows: encoded, all of one task.
        collate: makes batches.
        labels: class names, for classification.
    """
    spec = TaskSpec("classification" if labels else "language-modeling", tuple(labels))
    return spec.kind.evaluate(model, rows, collate)
