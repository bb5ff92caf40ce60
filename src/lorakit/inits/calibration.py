"""``Calibration``: examples on which an initialisation looks at the model before training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import DataError

Batch = Mapping[str, Any]


def own_loss(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return the loss that a transformers model computes itself; None where the batch has no labels."""
    return getattr(model(**batch), "loss", None)


def real_tokens(batch: Batch) -> Tensor | None:
    """Return which positions are not padding, ``[rows, positions]``, or None where the batch does not say."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass(frozen=True)
class Calibration:
    """Examples, and how the model runs on them.

    An encoder-decoder has positions of two kinds, of which ``counted`` knows one: give it batches without padding.

    Attributes:
        batches: batches that can be gone through again and again, each the keyword arguments of a forward; on
            the model's device.
        loss: the mean loss of a batch, whose gradients are looked at; it runs the model. None is refused.
        counted: which positions of a batch count, ``[rows, positions]`` with 0 for padding; None for all.
        weight: how much a batch's mean loss weighs among the others, such as its number of supervised tokens.
    """

    batches: Sequence[Batch]
    loss: Callable[[nn.Module, Batch], Tensor | None] = own_loss
    counted: Callable[[Batch], Tensor | None] = real_tokens
    weight: Callable[[Batch], float] = lambda batch: 1.0

    def first(self, rows: int) -> Calibration:
        """Return the fewest of the first batches that hold ``rows`` rows; all where there are not so many."""
        taken: list[Batch] = []
        missing = rows
        for batch in self.batches:
            if missing <= 0:
                break
            taken.append(batch)
            missing -= num_rows(batch)
        return replace(self, batches=taken)

    def shares(self) -> list[tuple[Batch, float]]:
        """Return the batches that hold anything, each with its share of the mean loss; the shares sum to 1.

        Raises:
            DataError: none does, or a weight is not a number of at least 0.
        """
        weights = [float(self.weight(batch)) if self._holds_any(batch) else 0.0 for batch in self.batches]
        wrong = [f"batch {i} weighs {weight}" for i, weight in enumerate(weights) if not 0 <= weight < math.inf]
        if wrong:
            raise DataError(f"a batch's weight is a number of at least 0; found: {', '.join(wrong)}.")
        total = sum(weights)
        if total == 0:
            raise DataError(
                f"there is nothing to look at: {len(self.batches)} batches, and none of them holds a position that "
                "counts. Give examples that are not all padding and have something to learn."
            )
        return [(batch, w / total) for batch, w in zip(self.batches, weights, strict=True) if w > 0]

    def _holds_any(self, batch: Batch) -> bool:
        mask = self.counted(batch)
        return num_rows(batch) > 0 and (mask is None or bool(mask.any()))


def num_rows(batch: Batch) -> int:
    """Return a batch's number of rows: the first dimension of its first tensor, or 1 without tensors."""
    tensors = (value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0)
    first = next(tensors, None)
    return 1 if first is None else first.shape[0]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let the model be looked at: in evaluation mode, nothing requiring gradients; all as before afterwards.

    On a GPU, recurrent layers run without cuDNN, which has no backward pass in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, grad in parameters:
            parameter.requires_grad_(required)
            parameter.grad = grad
