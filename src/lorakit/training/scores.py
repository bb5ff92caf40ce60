"""Scores of a classifier, from counts; and its probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.records import ClassScore, Evaluation
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator, ordered_batches
from lorakit.training.data.encode import EncodedRow

MOST_ROWS, MOST_TOKENS = 32, 8192


def bounded_batches(rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Cut rows into batches for a pass without gradients: like lengths together, longest first.

    A batch has at most 32 rows and, for texts' sake (logits are ``[rows, tokens, words]``), 8,192 tokens.
    """
    lengths = [len(row.input_ids) for row in rows]
    return ordered_batches(lengths, max(1, min(MOST_ROWS, MOST_TOKENS // max([1, *lengths]))))


def confusion_of(truth: Tensor, predicted: Tensor, num_classes: int) -> list[list[int]]:
    """Count pairs of true and predicted class: row = truth, column = prediction."""
    counts = torch.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    found: list[list[int]] = counts.view(num_classes, num_classes).tolist()
    return found


def class_scores(confusion: Sequence[Sequence[int]], labels: Sequence[str], loss: float) -> Evaluation:
    """Turn a confusion matrix (row = truth, column = prediction) into scores."""
    classes = []
    for i, label in enumerate(labels):
        found, support = confusion[i][i], sum(confusion[i])
        predicted = sum(row[i] for row in confusion)
        precision = found / predicted if predicted else 0.0
        recall = found / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if found else 0.0
        classes.append(ClassScore(label, precision, recall, f1, support))
    num_rows = sum(sum(row) for row in confusion)
    return Evaluation(
        loss=loss,
        num_rows=num_rows,
        accuracy=sum(confusion[i][i] for i in range(len(labels))) / max(num_rows, 1),
        macro_f1=sum(score.f1 for score in classes) / max(len(classes), 1),
        classes=tuple(classes),
        confusion=tuple(tuple(row) for row in confusion),
    )


@torch.no_grad()
def probabilities(model: Any, rows: Sequence[EncodedRow], collate: Collator) -> Tensor:
    """Return each row's class probabilities, ``[rows, classes]`` in fp32 on the CPU."""
    device = next(model.parameters()).device
    found, order = [], []
    with evaluating(model):
        for numbers in bounded_batches(rows):
            batch = collate([rows[i] for i in numbers])
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            found.append(model(**inputs).logits.float().softmax(-1).cpu())
            order += numbers
    return torch.cat(found)[torch.tensor(order).argsort()]
