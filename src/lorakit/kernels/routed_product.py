"""The products of a routed batch, the cheapest way or on Triton's kernels, with or without their derivatives."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lorakit.kernels import triton
from lorakit.kernels.cost_table import Problem, cheapest
from lorakit.kernels.routed import WAYS, Pairs, Way
from lorakit.kernels.segments import Segments


@torch.no_grad()
def add_products(out: Tensor, x: Tensor, pairs: Pairs, segments: Segments, way: Way | None = None) -> None:
    """Add ``s_g B_g A_g x_i`` to every row of a group in place, without derivatives.

    Args:
        out: ``[total, d_out]``, written in place; rows of no group keep their bits.
        x: ``[total, d_in]`` in ``out``'s dtype.
        pairs: the groups' factors in that dtype.
        segments: the rows of each group.
        way: how; :func:`taken` unless said.
    """
    way = way or taken(x, pairs, segments, False)
    kind = out.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext():
        way.forward(out, x, pairs, segments)


def add_trained(
    out: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
    segments: Segments,
    way: Way | None = None,
) -> Tensor:
    """Return ``out`` with the products added, differentiable (once) in out, x, A and B.

    The result lies in ``out``'s memory, which the operation that made ``out`` must not need for its own derivative;
    a linear layer's does not. What is kept for the backward pass is ``x`` itself and ``A x``.

    Args:
        out: ``[..., d_out]``, contiguous.
        x: ``[..., d_in]``; its leading dimensions flattened are ``total``.
        A: each group's ``[rank, d_in]``; rounded to ``out``'s dtype, the gradient is of its own.
        B: each group's ``[d_out, rank]``, likewise.
        scales: each group's factor.
        segments: the rows of each group.
        way: how; :func:`taken` unless said.
    """
    result: Tensor = _Products.apply(out, x, segments, way, tuple(scales), *A, *B)  # type: ignore[no-untyped-call]
    return result


def taken(x: Tensor, pairs: Pairs, segments: Segments, trained: bool) -> Way:
    """Return the way that rows ``x`` take: Triton's where its kernels are asked for and apply, else the cheapest."""
    if triton.applies(x):
        from lorakit.kernels.triton.ways import KERNELS

        return next(way for way in KERNELS if way.takes(pairs, segments, trained))
    return choose(pairs, segments, trained)


def choose(pairs: Pairs, segments: Segments, trained: bool) -> Way:
    """Return the cheapest way for this problem, found once for the layers that share it."""
    if pairs.chosen is not None and pairs.chosen[0]() is segments and pairs.chosen[1] == trained:
        return pairs.chosen[2]
    ways = [way for way in WAYS.values() if way.takes(pairs, segments, trained)]
    key = (tuple(way.name for way in ways), pairs.ranks, pairs.d_in, pairs.d_out, pairs.dtype, trained)
    if key not in segments.memo:
        problem = Problem.of(pairs, segments)
        segments.memo[key] = WAYS[cheapest(key[0], problem, segments.device, pairs.dtype, trained)]
    found: Way = segments.memo[key]
    pairs.chosen = (weakref.ref(segments), trained, found)
    return found


class _Products(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        segments: Segments,
        way: Way | None,
        scales: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        num = len(scales)
        pairs = Pairs(factors[:num], factors[num:], scales, out.dtype)
        rows = x.reshape(-1, x.shape[-1]).to(out.dtype)
        ctx.way = way or taken(rows, pairs, segments, True)
        result = out.data  # neither a view nor the same tensor to autograd, so that it keeps no second copy
        with torch.autocast(out.device.type, enabled=False):
            kept = ctx.way.forward(result.view(-1, result.shape[-1]), rows, pairs, segments)
        ctx.segments, ctx.scales, ctx.dtype = segments, scales, out.dtype
        ctx.save_for_backward(x, *factors, *kept)
        return result

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        num = len(ctx.scales)
        x, *rest = ctx.saved_tensors
        factors, kept = rest[: 2 * num], rest[2 * num :]
        pairs = Pairs(factors[:num], factors[num:], ctx.scales, ctx.dtype)
        with torch.autocast(d_out.device.type, enabled=False):
            rows, d_rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype), d_out.reshape(-1, d_out.shape[-1]).contiguous()
            found = ctx.way.backward(d_rows, rows, kept, pairs, ctx.segments, ctx.needs_input_grad[1])
        d_x = None if found.x is None else found.x.view(x.shape).to(x.dtype)
        d_factors = [gradient.to(factor.dtype) for gradient, factor in zip((*found.A, *found.B), factors, strict=True)]
        return d_out, d_x, None, None, None, *d_factors
