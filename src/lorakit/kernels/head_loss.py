"""The loss of a frozen head: scores, cross-entropy and the gradient to the hidden states in one pass over pieces.

A head with weight ``W`` gives the hidden states ``x`` of N positions the logits ``z = f(x W^T + b)`` over V words. The
summed cross-entropy and its gradient are

    L = sum_i (log sum_k exp z_ik - z_i,y_i)        dL/dx = ((softmax(z) - onehot(y)) * f'(x W^T + b)) W

As the head is frozen, only ``dL/dx`` is wanted, ``[N, width]``, and it is linear in what comes from above: it is made
right after the scores of a piece, which are then overwritten by the next piece's. So there are two products, as in the
plain path, nothing is computed twice, and no tensor with N x V numbers ever exists. (Liger Kernel, Hsu et al. 2024,
arXiv 2410.10989, section 3.2, makes gradients in the forward pass as well; there each piece's scores and their fp32
copy are whole tensors and the head's gradient is made too.)

Products are in the head's dtype; the softmax is in fp32 (fp64 of fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Scores at once, in the head's dtype: enough rows that each pass over the head's weight is worth its reading."""
FEWEST_BYTES_A_WORD = {"cpu": 512, "cuda": 2048}
"""However large the vocabulary: at least 128 rows at once in fp32 and 256 in a half dtype, on a GPU four times that."""
TILE_NUMBERS = 2**18
"""On a CPU the softmax goes over a piece by so many numbers, 1 MiB in fp32: they stay in the second-level cache."""
HALF_SCALE = 256.0
"""fp16 has no number between 0 and 6e-8: shares are this much larger while they are in fp16.

A share is at most 1 and a weighted mean of a head's weights at most their largest, so that 256 times it is far below
fp16's 65,504.
"""


@dataclass(frozen=True)
class Curve:
    """What a model makes of its head's scores: ``f(s) = cap tanh(factor s / cap)``, or ``factor s`` without a cap."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the logits."""
        return scores * self.factor if self.cap is None else self.cap * torch.tanh(scores * (self.factor / self.cap))


IDENTITY = Curve()


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, curve: Curve = IDENTITY) -> Tensor:
    """Return the cross-entropy of a frozen head's scores in nats, summed over the positions, in fp32 (fp64 of fp64).

    Only ``hidden`` gets a gradient; without one to make, none is made.

    Args:
        hidden: what goes into the head, ``[N, width]``, in the head's dtype.
        weight: the head's, ``[V, width]``.
        bias: the head's, ``[V]``, or None.
        labels: the words that are right, ``[N]``, int64, all in ``0..V-1``.
        curve: what the model makes of the scores.
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    found: Tensor = _HeadLoss.apply(hidden, weight, bias, labels, curve, learns)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def head_guesses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, curve: Curve = IDENTITY
) -> tuple[Tensor, Tensor]:
    """Return the loss as :func:`head_loss` does, and the likeliest word of each position, ``[N]``."""
    guesses = torch.empty_like(labels)
    return _pieces(hidden, weight, bias, labels, curve, None, guesses), guesses


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, curve: Curve, learns: bool
    ) -> Tensor:
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if learns else None
        loss = _pieces(hidden, weight, bias, labels, curve, gradient, None)
        ctx.rest = curve.factor / _half_scale(hidden)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In the loss's own dtype: what comes from above is 1 / tokens times the loss scale, too fine for a half dtype,
        # or too large.
        scaled = gradient.to(grads[0].dtype) * (grads[0] * ctx.rest)
        return scaled.to(gradient.dtype), None, None, None, None, None


def _pieces(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    curve: Curve,
    gradient: Tensor | None,
    guesses: Tensor | None,
) -> Tensor:
    """Return the summed loss; fill ``gradient`` (over ``factor``, times the half scale) and ``guesses`` if given."""
    count, words = len(hidden), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    if not count:
        return total
    size = min(count, piece_rows(words, hidden))
    scores = hidden.new_empty(size, words)
    tile = size if hidden.device.type != "cpu" else max(1, min(size, TILE_NUMBERS // words))
    room = scores if scores.dtype == wide else hidden.new_empty(tile, words, dtype=wide)
    for start in range(0, count, size):
        rows = hidden[start : start + size]
        piece = scores[: len(rows)]
        if bias is None:
            torch.mm(rows, weight.t(), out=piece)
        else:
            torch.addmm(bias, rows, weight.t(), out=piece)
        for first in range(0, len(piece), tile):
            part = piece[first : first + tile]
            place = slice(start + first, start + first + len(part))
            own = part if room is scores else room[: len(part)].copy_(part)
            if guesses is not None:
                torch.argmax(own, -1, out=guesses[place])
            total += _shares_(own, labels[place, None], curve, _half_scale(hidden), gradient is not None)
            if own is not part and gradient is not None:
                part.copy_(own)
        if gradient is not None:
            torch.mm(piece, weight, out=gradient[start : start + len(rows)])
    return total


def _shares_(scores: Tensor, labels: Tensor, curve: Curve, scale: float, learns: bool) -> Tensor:
    """Return the summed loss of a tile's scores, and turn these into the loss's derivatives by them over ``factor``.

    In place, where that is wanted: ``scale (softmax(z) - onehot(y)) f'(s) / factor``.
    """
    slope = None
    if curve.cap is None:
        if curve.factor != 1.0:
            scores.mul_(curve.factor)
    else:
        scores.mul_(curve.factor / curve.cap).tanh_()
        slope = scores.square().neg_().add_(1.0) if learns else None
        scores.mul_(curve.cap)
    own = scores.gather(-1, labels)
    most = scores.amax(-1, keepdim=True)
    sums = scores.sub_(most).exp_().sum(-1, keepdim=True)
    if learns:
        scores.mul_(scale / sums)
        scores.scatter_add_(-1, labels, torch.full_like(own, -scale))
        if slope is not None:
            scores.mul_(slope)
    return (sums.log() + most - own).sum()


def _half_scale(hidden: Tensor) -> float:
    return HALF_SCALE if hidden.dtype == torch.float16 else 1.0


def piece_rows(words: int, hidden: Tensor) -> int:
    """Return how many positions' scores are made at once."""
    kind = "cpu" if hidden.device.type == "cpu" else "cuda"
    return max(FEWEST_BYTES_A_WORD[kind], PIECE_BYTES[kind] // words) // hidden.element_size()
