"""Routed batches on Triton's kernels, as ways of :mod:`lorakit.kernels.routed`: by segments, by rows for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lorakit.kernels.linear import Pair
from lorakit.kernels.routed import Gradients, Pairs, Way
from lorakit.kernels.segments import Segments
from lorakit.kernels.triton.launch import tiles_for
from lorakit.kernels.triton.routed import Route, Shape, contiguous, expand, gradients, routed_rows, shrink

ONLY = range(1)  # a way computes one layer at a time: one slice
# Rows that a group has on average, told from the sizes of tiles and not measured.
FEW_ROWS = 4  # up to here tiles of 16 rows would be three quarters empty: row by row
MANY_ROWS = 64  # from here on most tiles of 64 rows are full


class BySegments(Way):
    """Rows sorted by group, tile by tile, where they lie (SGMV)."""

    name = "triton by segments"

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        A, B = _factors(pairs)
        shape = _shape(x, pairs, segments)
        H = shrink(x.contiguous(), A, shape, ONLY, scaled=False, rank_first=True)
        expand([out], H, B, shape, ONLY, scaled=True, rank_first=False)
        return [H]

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        A, B = _factors(pairs)
        x, (H,) = x.contiguous(), kept
        d_x = torch.zeros_like(x) if with_x else None
        h = H.sum(0)[0].to(x.dtype)
        d_A, d_B = gradients(d_out, x, h, A, B, _shape(x, pairs, segments), 0, d_x)
        return Gradients(d_A, d_B, d_x)


class ByRows(BySegments):
    """Every row for itself, unsorted (BGMV). Keeps nothing: its backward pass makes ``A x`` again, by segments."""

    name = "triton by rows"

    @override
    def takes(self, pairs: Pairs, segments: Segments, trained: bool) -> bool:
        """Few rows of each group, and no backward pass: decoding."""
        return not trained and segments.num <= FEW_ROWS * segments.num_groups

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        if "ids" not in segments.memo:
            segments.memo["ids"] = segments.groups_as_they_lie.int()
        row = [Pair(*parts) for parts in zip(*pairs.rounded, pairs.scales, strict=True)]
        routed_rows(x, [out], [row], segments.memo["ids"])
        return []

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        shape = _shape(x, pairs, segments)
        H = shrink(x.contiguous(), _factors(pairs)[0], shape, ONLY, scaled=False, rank_first=True)
        return super().backward(d_out, x, [H], pairs, segments, with_x)


KERNELS: tuple[Way, ...] = (ByRows(), BySegments())  # the first that takes a problem is right for it


def _factors(pairs: Pairs) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the factors as they were given, which kernels round as they read; rounded where their dtypes differ."""
    alike = len({factor.dtype for factors in pairs.given for factor in factors}) == 1
    A, B = pairs.given if alike else pairs.rounded
    return contiguous(A), contiguous(B)


def _shape(x: Tensor, pairs: Pairs, segments: Segments) -> Shape:
    """Return what a launch needs to know, the rows sorted once for all layers of a forward."""
    if "route" not in segments.memo:
        wide = segments.num >= MANY_ROWS * segments.num_groups
        segments.memo["route"] = Route.of(segments.groups_as_they_lie, segments.num_groups, 64 if wide else 16)
    return Shape((pairs.scales,), (pairs.ranks,), segments.memo["route"], tiles_for(x))
