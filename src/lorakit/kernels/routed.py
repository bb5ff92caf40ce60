"""A product of its own for each group of rows: ``out_i += s_g B_g A_g x_i`` for every row ``i`` of group ``g``.

Each way computes this for one batch and its derivatives; which is cheapest depends on the sizes
(:mod:`lorakit.kernels.cost_table`):

    runs      one product per run of neighbouring rows, where they lie
    loop      rows sorted by group, one product per group
    grouped   rows sorted by group, torch's grouped product
    padded    every group filled up to the largest, one batched product
    joined    all factors as one: ``(x A_all^T) * mask``, then ``B_all``; wasteful in products, one call

Factors of smaller rank are filled up with zeros where a way needs one rank, which changes no sum. A row of no group
is never written, so that it keeps its bits, and no way lets one group's infinities reach another's rows. The
segmented products are Punica's SGMV (Chen et al. 2023, arXiv 2310.18547) in the words of torch.

Shapes: x ``[total, d_in]``, out ``[total, d_out]``, A ``[rank, d_in]``, B ``[d_out, rank]``.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lorakit.kernels.segments import Segments

_HAS_GROUPED = hasattr(F, "grouped_mm")  # torch 2.10
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16  # of every stride that a grouped product takes
_HALF = (torch.bfloat16, torch.float16)


class Pairs:
    """The factors of several groups at one layer.

    Attributes:
        given: each group's A, and each group's B, as they came.
        scales: each group's factor on ``B A``.
        ranks: each group's rank.
        chosen: for which rows, trained or not, a way was chosen last, and which.
    """

    chosen: tuple[weakref.ref[Segments], bool, Way] | None = None

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> None:
        self.given = (tuple(A), tuple(B))
        self.scales = tuple(scales)
        self.ranks = tuple(a.shape[0] for a in A)
        self.dtype = dtype
        self.d_in, self.d_out = A[0].shape[1], B[0].shape[0]

    @functools.cached_property
    def rounded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each group's A, and each group's B, in ``dtype``."""
        A, B = self.given
        return [a.to(self.dtype) for a in A], [b.to(self.dtype) for b in B]

    @functools.cached_property
    def joined(self) -> tuple[Tensor, Tensor]:
        """All factors below each other: ``A[sum of ranks, d_in]``, ``s B^T[sum of ranks, d_out]``."""
        up = torch.cat([b.t() for b in self.given[1]])
        if set(self.scales) == {self.scales[0]}:
            up = up * self.scales[0]
        else:
            factors = [scale for scale, rank in zip(self.scales, self.ranks, strict=True) for _ in range(rank)]
            up = up * torch.tensor(factors, dtype=up.dtype, device=up.device)[:, None]
        return torch.cat(self.rounded[0]), up.to(self.dtype)

    @functools.cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """All factors at one rank: ``A[groups, rank, d_in]``, ``s B^T[groups, rank, d_out]``, zeros below their own."""
        A, up = self.joined
        rank = self.block_rank
        if set(self.ranks) == {rank}:
            return A.view(-1, rank, self.d_in), up.view(-1, rank, self.d_out)
        blocks_A, blocks_up = (part.new_zeros(len(self.ranks), rank, part.shape[1]) for part in (A, up))
        for group, (a, b) in enumerate(
            zip(A.split_with_sizes(self.ranks), up.split_with_sizes(self.ranks), strict=True)
        ):
            blocks_A[group, : len(a)] = a
            blocks_up[group, : len(b)] = b
        return blocks_A, blocks_up

    @property
    def block_rank(self) -> int:
        """The largest rank, rounded up to what a grouped product takes."""
        step = _ALIGNMENT_BYTES // self.dtype.itemsize
        return -(-max(self.ranks) // step) * step

    @functools.cached_property
    def finite(self) -> bool:
        """Whether every factor is finite, so that a zero of a mask takes it away."""
        return all(bool(torch.isfinite(part).all()) for part in self.joined)


@dataclass
class Gradients:
    """What a way's backward pass returns: each group's factors' gradients, and the input's."""

    A: list[Tensor]
    B: list[Tensor]
    x: Tensor | None


class Way(ABC):
    """One way to compute the products of all groups."""

    name: ClassVar[str]

    def takes(self, pairs: Pairs, segments: Segments, trained: bool) -> bool:
        """Tell whether this way is right for the problem, whatever it costs."""
        return True

    @abstractmethod
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        """Add the products to ``out`` in place and return ``A x``, as :meth:`backward` wants it."""

    @abstractmethod
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        """Return the gradients in ``d_out``'s dtype; the input's only where it is wanted."""


class Runs(Way):
    """Where the rows lie: nothing is moved, which is best for whole sequences."""

    name = "runs"

    @override
    def takes(self, pairs: Pairs, segments: Segments, trained: bool) -> bool:
        """A group's gradient is summed over its runs in its own dtype: in half precision one run each."""
        return not (trained and pairs.dtype in _HALF and segments.num_runs > segments.num_groups)

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        sizes = segments.run_sizes
        pieces = zip(segments.runs, x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)
        return [_add_piece(to, rows, pairs, group, 1.0) for (group, _), rows, to in pieces if group >= 0]

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        make = torch.empty_like if segments.covers else torch.zeros_like
        d_x = make(x, memory_format=torch.contiguous_format) if with_x else None
        sizes = segments.run_sizes
        places = itertools.repeat(None) if d_x is None else d_x.split_with_sizes(sizes)
        pieces = zip(segments.runs, d_out.split_with_sizes(sizes), x.split_with_sizes(sizes), places, strict=False)
        return _pieces_backward((piece for piece in pieces if piece[0][0] >= 0), kept, pairs, d_x)


class Loop(Way):
    """Sorted rows, one product per group."""

    name = "loop"

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        total = out.new_empty(segments.num, out.shape[1])
        pieces = zip(
            segments.take(x).split_with_sizes(segments.counts), total.split_with_sizes(segments.counts), strict=True
        )
        kept = [_add_piece(to, rows, pairs, group, 0.0) for group, (rows, to) in enumerate(pieces)]
        segments.add(out, total)
        return kept

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        counts = segments.counts
        d_rows = x.new_empty(segments.num, x.shape[1]) if with_x else None
        places = itertools.repeat(None) if d_rows is None else d_rows.split_with_sizes(counts)
        rows = zip(
            segments.take(d_out).split_with_sizes(counts),
            segments.take(x).split_with_sizes(counts),
            places,
            strict=False,
        )
        pieces = (((group, 0), *parts) for group, parts in enumerate(rows))
        found = _pieces_backward(pieces, kept, pairs, d_rows)
        return Gradients(found.A, found.B, None if d_rows is None else segments.spread(d_rows))


class Grouped(Way):
    """Sorted rows, one grouped product for all groups."""

    name = "grouped"

    @override
    def takes(self, pairs: Pairs, segments: Segments, trained: bool) -> bool:
        step = _ALIGNMENT_BYTES // pairs.dtype.itemsize
        aligned = pairs.d_in % step == 0 and pairs.d_out % step == 0
        return _HAS_GROUPED and pairs.dtype in _GROUPED_DTYPES and aligned

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        A, up = pairs.blocks
        h = F.grouped_mm(_dense(segments.take(x)), A.mT, offs=segments.ends)
        segments.add(out, F.grouped_mm(h, up, offs=segments.ends))
        return [h]

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        (A, up), (h,), ends = pairs.blocks, kept, segments.ends
        d_rows = _dense(segments.take(d_out))
        d_h = F.grouped_mm(d_rows, up.mT, offs=ends)
        d_A = F.grouped_mm(d_h.t(), _dense(segments.take(x)), offs=ends)
        d_up = F.grouped_mm(h.t(), d_rows, offs=ends)
        d_x = segments.spread(F.grouped_mm(d_h, A, offs=ends)) if with_x else None
        return Gradients(*_of_blocks(d_A, d_up, pairs), d_x)


class Padded(Way):
    """Every group filled up to the largest with rows of its own, whose products are left."""

    name = "padded"

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        A, up = pairs.blocks
        h = torch.bmm(_filled(x, segments), A.mT)
        segments.add(out, _unfilled(torch.bmm(h, up), segments))
        return [h]

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        (A, up), (h,), filling = pairs.blocks, kept, segments.filling
        d_rows = _filled(d_out, segments)
        d_h = torch.bmm(d_rows, up.mT)
        if filling is not None:
            h, d_h = h.masked_fill(filling, 0.0), d_h.masked_fill_(filling, 0.0)
        d_A, d_up = torch.bmm(d_h.mT, _filled(x, segments)), torch.bmm(h.mT, d_rows)
        d_x = segments.spread(_unfilled(torch.bmm(d_h, A), segments)) if with_x else None
        return Gradients(*_of_blocks(d_A, d_up, pairs), d_x)


class Joined(Way):
    """All groups' factors as one pair, and a mask: few calls, for few rows."""

    name = "joined"

    @override
    def takes(self, pairs: Pairs, segments: Segments, trained: bool) -> bool:
        """One group's factors meet another's rows, times zero: all must be finite, which training cannot promise."""
        return not trained and pairs.finite

    @override
    def forward(self, out: Tensor, x: Tensor, pairs: Pairs, segments: Segments) -> list[Tensor]:
        A, up = pairs.joined
        h = (x if segments.covers else segments.take(x)) @ A.t()
        h.masked_fill_(_foreign(pairs, segments), 0.0)
        if segments.covers:
            out.addmm_(h, up)
        else:
            segments.add(out, h @ up)
        return [h]

    @override
    def backward(
        self, d_out: Tensor, x: Tensor, kept: Sequence[Tensor], pairs: Pairs, segments: Segments, with_x: bool
    ) -> Gradients:
        (A, up), (h,) = pairs.joined, kept
        d_rows, rows = (part if segments.covers else segments.take(part) for part in (d_out, x))
        d_h = (d_rows @ up.t()).masked_fill_(_foreign(pairs, segments), 0.0)
        d_A, d_up = d_h.t() @ rows, h.t() @ d_rows
        d_x = None
        if with_x:
            d_x = d_h @ A if segments.covers else segments.spread(d_h @ A)
        return Gradients(
            list(d_A.split_with_sizes(pairs.ranks)), _of_up(d_up.split_with_sizes(pairs.ranks), pairs), d_x
        )


WAYS: dict[str, Way] = {way.name: way for way in (Runs(), Loop(), Grouped(), Padded(), Joined())}


def _add_piece(to: Tensor, rows: Tensor, pairs: Pairs, group: int, beta: float) -> Tensor:
    A, B = pairs.rounded
    h = rows @ A[group].t()
    to.addmm_(h, B[group].t(), beta=beta, alpha=pairs.scales[group])
    return h


_Piece = tuple[tuple[int, int], Tensor, Tensor, Tensor | None]


def _pieces_backward(pieces: Iterator[_Piece], kept: Sequence[Tensor], pairs: Pairs, d_x: Tensor | None) -> Gradients:
    """Return the gradients of products piece by piece; each piece's part of ``d_x`` is written where it lies."""
    d_A: dict[int, Tensor] = {}
    d_B: dict[int, Tensor] = {}
    A, B = pairs.rounded
    for ((group, _), d_rows, rows, place), h in zip(pieces, kept, strict=True):
        d_h = (d_rows @ B[group]).mul_(pairs.scales[group])
        if group in d_A:
            d_A[group].addmm_(d_h.t(), rows)
            d_B[group].addmm_(d_rows.t(), h, alpha=pairs.scales[group])
        else:
            d_A[group] = d_h.t() @ rows
            d_B[group] = (d_rows.t() @ h).mul_(pairs.scales[group])
        if place is not None:
            torch.mm(d_h, A[group], out=place)
    groups = range(len(pairs.ranks))
    return Gradients([d_A[group] for group in groups], [d_B[group] for group in groups], d_x)


def _of_blocks(d_A: Tensor, d_up: Tensor, pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the gradients of filled-up factors to each group's rank."""
    cut_A = [part[:rank] for part, rank in zip(d_A, pairs.ranks, strict=True)]
    cut_up = [part[:rank] for part, rank in zip(d_up, pairs.ranks, strict=True)]
    return cut_A, _of_up(cut_up, pairs)


def _of_up(d_up: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
    """Return B's gradients from those of ``s B^T``."""
    return [part.t() * scale for part, scale in zip(d_up, pairs.scales, strict=True)]


def _filled(values: Tensor, segments: Segments) -> Tensor:
    """Return ``[groups, widest, ...]``; a view where the groups are of one size and lie sorted."""
    even = segments.start is not None and segments.filling is None
    rows = segments.take(values) if even else values.index_select(0, segments.padded)
    return rows.view(segments.num_groups, segments.widest, -1)


def _unfilled(blocks: Tensor, segments: Segments) -> Tensor:
    rows = blocks.flatten(0, 1)
    return rows if segments.filling is None else rows.index_select(0, segments.unpadded)


def _foreign(pairs: Pairs, segments: Segments) -> Tensor:
    """Return ``[rows, sum of ranks]``, true where a column of ``A x`` is of another group than the row."""
    key = ("foreign", pairs.ranks)
    if key not in segments.memo:
        of_rows = segments.groups_as_they_lie if segments.covers else segments.groups
        columns = [group for group, rank in enumerate(pairs.ranks) for _ in range(rank)]
        segments.memo[key] = of_rows[:, None] != torch.tensor(columns, device=of_rows.device)
    mask: Tensor = segments.memo[key]
    return mask


def _dense(rows: Tensor) -> Tensor:
    """Return rows whose strides a grouped product takes."""
    return rows.contiguous()
