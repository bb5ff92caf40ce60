"""Device code of routed batches, in Triton: rows of one batch, each with its own adapter or none.

SGMV (segmented): rows are taken in the order of their adapters, tile by tile; ``order`` says which row stands where, so
that x itself is never moved. BGMV (batched): every row on its own, for decoding, without any order. Both go through a
narrow ``H``, and read the factors through a table of addresses, so that adapters are neither stacked nor padded.

``T`` rows, ``D`` the wide side of a factor (d_in of A, d_out of B), ``R`` the largest rank, ``G`` adapters. A factor
is stored with its ranks in front (``RANK_FIRST``: ``[rank, D]``, as A) or behind (``[D, rank]``, as B). Rows of no
adapter appear in no tile: nothing of them is read or written. See ``device_linear`` for ``DOT`` and ``ACC``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton.language as tl


def factor(
    table: tl.tensor, place: tl.tensor, ranks: tl.tensor, wide: tl.tensor, rank: tl.tensor, D: tl.tensor,
    RANK_FIRST: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the tile ``[ranks, wide]`` of the factor whose address is at ``table[place]``, zero beyond its edges."""
    start = tl.multiple_of(tl.load(table + place).to(tl.pointer_type(DTYPE)), ALIGN)
    if RANK_FIRST:
        places = ranks.to(tl.int64)[:, None] * D + wide[None, :]
    else:
        places = ranks[:, None] + wide.to(tl.int64)[None, :] * rank
    return tl.load(start + places, mask=(ranks < rank)[:, None] & (wide < D)[None, :], other=0.0)


def summed(H: tl.tensor, places: tl.tensor, inside: tl.tensor, step: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """Return a tile of H summed over the splits, which lie ``step`` apart."""
    total = tl.load(H + places, mask=inside, other=0.0)
    for _ in range(1, SPLITS):
        places += step
        total += tl.load(H + places, mask=inside, other=0.0)
    return total


def output(
    y0: tl.tensor, y1: tl.tensor, y2: tl.tensor, d0: tl.tensor, d1: tl.tensor, d2: tl.tensor, slice_: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return a slice's output and its width."""
    y, D = y0, tl.cast(d0, tl.int32)
    if slice_ == 1:
        y, D = y1, tl.cast(d1, tl.int32)
    if slice_ == 2:
        y, D = y2, tl.cast(d2, tl.int32)
    return y, D


def segment_shrink(
    x: tl.tensor, H: tl.tensor, table: tl.tensor, all_ranks: tl.tensor, scales: tl.tensor,
    order: tl.tensor, starts: tl.tensor, tile_adapter: tl.tensor, tile_start: tl.tensor,
    T: tl.tensor, D: tl.tensor, R: tl.tensor, G: tl.tensor, chunk: tl.tensor,
    SCALED: tl.constexpr, RANK_FIRST: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, SLICES: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``H[s, slice, i] = [scale] x[order[i]] factor^T`` over the s-th chunk of x's columns.

    x is ``[T, D]``, H ``[splits, SLICES, T, R]`` in ACC, in sorted order. Each tile holds rows of one adapter; a tile
    without one ends at once.
    """
    tile, split, slice_ = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tile_adapter + tile)
    if adapter >= 0:
        rank = tl.load(all_ranks + slice_ * G + adapter)
        spots = tl.load(tile_start + tile) + tl.arange(0, BM)
        present = spots < tl.load(starts + adapter + 1)
        rows = tl.load(order + spots, mask=present, other=0).to(tl.int64)
        for first in range(0, rank, BR):
            ranks = first + tl.arange(0, BR)
            acc = tl.zeros((BM, BR), ACC)
            for k in range(split * chunk, tl.minimum(split * chunk + chunk, D), BK):
                cols = k + tl.arange(0, BK)
                inside = present[:, None] & (cols < D)[None, :]
                values = tl.load(x + rows[:, None] * D + cols[None, :], mask=inside, other=0.0)
                f = factor(table, slice_ * G + adapter, ranks, cols, rank, D, RANK_FIRST, DTYPE, ALIGN).to(values.dtype)
                acc = tl.dot(values.to(DOT), tl.trans(f.to(DOT)), acc, input_precision=PRECISION, out_dtype=ACC)
            if SCALED:
                acc *= tl.load(scales + slice_ * G + adapter)
            places = ((split * SLICES + slice_).to(tl.int64) * T + spots)[:, None] * R + ranks[None, :]
            tl.store(H + places, acc, mask=present[:, None] & (ranks < rank)[None, :])


def segment_expand(
    y0: tl.tensor, y1: tl.tensor, y2: tl.tensor, d0: tl.tensor, d1: tl.tensor, d2: tl.tensor,
    H: tl.tensor, table: tl.tensor, all_ranks: tl.tensor, scales: tl.tensor,
    order: tl.tensor, starts: tl.tensor, tile_adapter: tl.tensor, tile_start: tl.tensor,
    T: tl.tensor, R: tl.tensor, G: tl.tensor,
    SCALED: tl.constexpr, RANK_FIRST: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr,
    SLICES: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Add ``[scale] H factor`` to the rows of up to three outputs in place, one for each slice of H.

    ``y0[T, d0]``, ``y1[T, d1]``, ``y2[T, d2]`` (any of them again where there are fewer). A row belongs to one tile, so
    no two programs write the same place.
    """
    tile, slice_ = tl.program_id(0), tl.program_id(2)
    adapter = tl.load(tile_adapter + tile)
    y, D = output(y0, y1, y2, d0, d1, d2, slice_)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    if adapter >= 0:
        rank = tl.load(all_ranks + slice_ * G + adapter)
        if (rank > 0) & (tl.program_id(1) * BN < D):
            spots = tl.load(tile_start + tile) + tl.arange(0, BM)
            present = spots < tl.load(starts + adapter + 1)
            rows = tl.load(order + spots, mask=present, other=0).to(tl.int64)
            acc = tl.zeros((BM, BN), ACC)
            for first in range(0, rank, BR):
                ranks = first + tl.arange(0, BR)
                places = (slice_.to(tl.int64) * T + spots)[:, None] * R + ranks[None, :]
                inside = present[:, None] & (ranks < rank)[None, :]
                h = summed(H, places, inside, SLICES * T * R, SPLITS).to(y.dtype.element_ty)
                f = factor(table, slice_ * G + adapter, ranks, cols, rank, D, RANK_FIRST, DTYPE, ALIGN).to(h.dtype)
                acc = tl.dot(h.to(DOT), f.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
            if SCALED:
                acc *= tl.load(scales + slice_ * G + adapter)
            at = y + rows[:, None] * D + cols[None, :]
            inside = present[:, None] & (cols < D)[None, :]
            tl.store(at, (tl.load(at, mask=inside, other=0.0) + acc).to(y.dtype.element_ty), mask=inside)


def segment_outer(
    H: tl.tensor, v: tl.tensor, out: tl.tensor, all_ranks: tl.tensor, scales: tl.tensor,
    order: tl.tensor, starts: tl.tensor,
    D: tl.tensor, R: tl.tensor, G: tl.tensor,
    SCALED: tl.constexpr, RANK_FIRST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    SPLITS: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``[scale] H^T v`` over the rows of each adapter: the gradient of a factor.

    H is ``[T, R]`` in sorted order and v's dtype, v ``[T, D]``, out ``[SPLITS, G, R, D]`` in ACC (without RANK_FIRST
    ``[SPLITS, G, D, R]``). A split takes every SPLITS-th tile of the adapter's rows. What H holds beyond an adapter's
    own rank counts as zero: nobody wrote there.
    """
    adapter, split = tl.program_id(1), tl.program_id(2) % SPLITS
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks = tl.program_id(2) // SPLITS * BR + tl.arange(0, BR)
    begin, end = tl.load(starts + adapter), tl.load(starts + adapter + 1)
    rank = tl.load(all_ranks + adapter)
    acc = tl.zeros((BK, BR), ACC)
    for m in range(begin + split * BM, end, SPLITS * BM):
        spots = m + tl.arange(0, BM)
        present = spots < end
        rows = tl.load(order + spots, mask=present, other=0).to(tl.int64)
        places = spots.to(tl.int64)[:, None] * R + ranks[None, :]
        h = tl.load(H + places, mask=present[:, None] & (ranks < rank)[None, :], other=0.0).to(DOT)
        inside = present[:, None] & (cols < D)[None, :]
        values = tl.load(v + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(DOT)
        acc = tl.dot(tl.trans(values), h, acc, input_precision=PRECISION, out_dtype=ACC)
    if SCALED:
        acc *= tl.load(scales + adapter)
    share = out + (split * G + adapter).to(tl.int64) * R * D
    if RANK_FIRST:
        places = ranks.to(tl.int64)[None, :] * D + cols[:, None]
    else:
        places = ranks[None, :] + cols.to(tl.int64)[:, None] * R
    tl.store(share + places, acc, mask=(cols < D)[:, None] & (ranks < R)[None, :])


def row_shrink(
    x: tl.tensor, H: tl.tensor, table: tl.tensor, all_ranks: tl.tensor, ids: tl.tensor,
    T: tl.tensor, D: tl.tensor, R: tl.tensor, G: tl.tensor, chunk: tl.tensor,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, SLICES: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``H[s, slice, row] = A x[row]`` of the row's own adapter over the s-th chunk of columns."""
    row, split, slice_ = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(ids + row)
    if adapter >= 0:
        rank = tl.load(all_ranks + slice_ * G + adapter)
        for first in range(0, rank, BR):
            ranks = first + tl.arange(0, BR)
            acc = tl.zeros((BR, BK), ACC)
            for k in range(split * chunk, tl.minimum(split * chunk + chunk, D), BK):
                cols = k + tl.arange(0, BK)
                values = tl.load(x + row.to(tl.int64) * D + cols, mask=cols < D, other=0.0)
                f = factor(table, slice_ * G + adapter, ranks, cols, rank, D, True, DTYPE, ALIGN).to(values.dtype)
                acc += f.to(ACC) * values.to(ACC)[None, :]
            places = ((split * SLICES + slice_).to(tl.int64) * T + row) * R + ranks
            tl.store(H + places, tl.sum(acc, 1), mask=ranks < rank)


def row_expand(
    y0: tl.tensor, y1: tl.tensor, y2: tl.tensor, d0: tl.tensor, d1: tl.tensor, d2: tl.tensor,
    H: tl.tensor, table: tl.tensor, all_ranks: tl.tensor, scales: tl.tensor, ids: tl.tensor,
    T: tl.tensor, R: tl.tensor, G: tl.tensor,
    DTYPE: tl.constexpr, ALIGN: tl.constexpr, SLICES: tl.constexpr, SPLITS: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """Add ``scale * B H[row]`` of the row's own adapter to up to three outputs in place."""
    row, slice_ = tl.program_id(0), tl.program_id(2)
    adapter = tl.load(ids + row)
    y, D = output(y0, y1, y2, d0, d1, d2, slice_)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    if adapter >= 0:
        rank = tl.load(all_ranks + slice_ * G + adapter)
        if (rank > 0) & (tl.program_id(1) * BN < D):
            acc = tl.zeros((BN,), ACC)
            for first in range(0, rank, BR):
                ranks = first + tl.arange(0, BR)
                places = (slice_.to(tl.int64) * T + row) * R + ranks
                h = summed(H, places, ranks < rank, SLICES * T * R, SPLITS).to(y.dtype.element_ty)
                f = factor(table, slice_ * G + adapter, ranks, cols, rank, D, False, DTYPE, ALIGN).to(h.dtype)
                acc += tl.sum(f.to(ACC) * h.to(ACC)[:, None], 0)
            at = y + row.to(tl.int64) * D + cols
            acc *= tl.load(scales + slice_ * G + adapter)
            tl.store(at, (tl.load(at, mask=cols < D, other=0.0) + acc).to(y.dtype.element_ty), mask=cols < D)
