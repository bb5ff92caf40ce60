"""Summed cross-entropy in pieces: no copy of all scores in fp32, neither forward nor backward.

A vocabulary is large and its scores are the largest tensor of a step. ``F.cross_entropy(logits.float())`` keeps two
fp32 copies and makes a third in the backward pass; here the scores are read a few rows at a time, in fp32, and only
their gradient is as large as they are, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE_NUMBERS = 2**22
"""Scores in fp32 at once: 16 MiB, a few of which stay in a CPU's caches and give a GPU enough to do."""


def summed_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Return ``sum_i (log sum_k exp z_ik - z_i,truth_i)`` in nats, in fp32 (fp64 of fp64).

    Args:
        logits: ``[N, K]``, any float dtype.
        truth: ``[N]``, int64, all in ``0..K-1``.
    """
    total: Tensor = _Summed.apply(logits, truth)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, truth: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        totals = logits.new_empty(len(logits), dtype=wide)
        sum_ = logits.new_zeros((), dtype=wide)
        for rows in _pieces(logits):
            scores = logits[rows].to(wide)
            totals[rows] = scores.logsumexp(-1)
            sum_ += (totals[rows] - scores.gather(-1, truth[rows, None]).squeeze(-1)).sum()
        ctx.save_for_backward(logits, truth, totals)
        return sum_

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, truth, totals = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in _pieces(logits):
            shares = (logits[rows].to(totals.dtype) - totals[rows, None]).exp_()
            own = truth[rows, None]
            shares.scatter_(-1, own, shares.gather(-1, own) - 1.0)
            found[rows] = shares.mul_(grads[0])
        return found, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    size = max(1, PIECE_NUMBERS // max(1, logits.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
