"""Losses and scores of each task, on a batch and on a set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.errors import ModelError
from lorakit.records import ClassScore, Evaluation
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator, ordered_batches
from lorakit.training.data.encode import IGNORED, EncodedRow

MOST_ROWS, MOST_TOKENS = 32, 8192


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the model's logits for a collated batch, without letting it compute a loss of its own.

    Raises:
        ModelError: the model has no head, or one for another task.
    """
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    if batch["labels"].dim() == 2 and _is_encoder_decoder(model):
        inputs["decoder_input_ids"] = _shifted_right(model, batch["labels"])
    logits = getattr(model(**inputs), "logits", None)
    kind = type(_unwrapped(model)).__name__
    wanted = "one score per class" if batch["labels"].dim() == 1 else "one score per word at every position"
    if not isinstance(logits, Tensor):
        raise ModelError(f"{kind} has no logits; this task needs {wanted}. Load the model with the task's head.")
    if logits.dim() != batch["labels"].dim() + 1:
        raise ModelError(
            f"{kind} gives logits of shape {list(logits.shape)}; this task needs {wanted}. "
            "Load the model with the task's head, or give its name instead."
        )
    return logits


def aligned(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Line up predictions with what they predict.

    Returns:
        ``[N, classes]`` and ``[N]``: rows for classification, all supervised tokens for text (a decoder's
        logit at one position predicts the next token).
    """
    if labels.dim() == 1:
        return logits, labels
    if not _is_encoder_decoder(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    supervised = labels != IGNORED
    return logits[supervised], labels[supervised]


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the cross-entropy in nats, summed over rows or supervised tokens in fp32, and their number."""
    logits, labels = aligned(model, forward(model, batch), batch["labels"])
    return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


def count_units(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return how many rows or supervised tokens a batch's loss is a sum over."""
    labels = batch["labels"]
    if labels.dim() == 1:
        return len(labels)
    return int((labels if _is_encoder_decoder(model) else labels[:, 1:]).ne(IGNORED).sum())


def bounded_batches(rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Cut rows into batches for a pass without gradients: like lengths together, longest first.

    A batch has at most 32 rows and, for texts' sake (logits are ``[rows, tokens, words]``), 8,192 tokens.
    """
    lengths = [len(row.input_ids) for row in rows]
    return ordered_batches(lengths, max(1, min(MOST_ROWS, MOST_TOKENS // max([1, *lengths]))))


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[EncodedRow], collate: Collator, labels: Sequence[str] = ()) -> Evaluation:
    """Measure a model on rows; its training mode is as it was afterwards.

    Args:
        model: predicts classes or tokens.
        rows: encoded, all of one task.
        collate: makes batches.
        labels: class names, for classification.
    """
    total, count, hits, confusion = 0.0, 0, 0, torch.zeros(len(labels), len(labels), dtype=torch.int64)
    device = next(model.parameters()).device
    with evaluating(model):
        for numbers in bounded_batches(rows):
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in numbers]).items()}
            logits, truth = aligned(model, forward(model, batch), batch["labels"])
            total += float(F.cross_entropy(logits.float(), truth, reduction="sum"))
            count += len(truth)
            predicted = logits.argmax(-1)
            hits += int((predicted == truth).sum())
            if labels:
                pairs = (truth * len(labels) + predicted).cpu()
                confusion += torch.bincount(pairs, minlength=len(labels) ** 2).view(len(labels), len(labels))
    loss = total / max(count, 1)
    if labels:
        return scored(confusion.tolist(), labels, loss)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, len(rows), num_tokens=count, perplexity=perplexity, accuracy=hits / max(count, 1))


def goodness(evaluation: Evaluation) -> tuple[float, float]:
    """Return what two measurements are compared by, more is better: a classifier's accuracy, then the loss."""
    accuracy = evaluation.accuracy if evaluation.classes else None
    return accuracy or 0.0, -evaluation.loss


def scored(confusion: Sequence[Sequence[int]], labels: Sequence[str], loss: float) -> Evaluation:
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


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", None)
    return inner if isinstance(model, nn.parallel.DistributedDataParallel) and isinstance(inner, nn.Module) else model


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(_unwrapped(model), "config", None), "is_encoder_decoder", False))


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Return what the decoder reads: the start token, then the labels but the last; padding where masked."""
    config: Any = _unwrapped(model).config
    shifted = labels.new_full(labels.shape, config.decoder_start_token_id)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
