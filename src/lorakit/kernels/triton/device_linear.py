"""Device code of the adapted linear layer, in Triton.

Plain functions until :func:`lorakit.kernels.triton.launch.compiled` turns them into kernels, so that this file
can be read, imported and packaged where Triton is not. Shapes: ``M`` rows (tokens), ``K`` = d_in, ``N`` = d_out,
``R`` ranks of all adapters that read the same x. ``BM``, ``BN``, ``BK``, ``BR`` are the sides of a tile. Factors
are rounded to the activations' dtype, products are summed in ``ACC``; ``DOT`` is the dtype that the operands of a
product are widened to (the activations' own on a GPU).

No kernel adds atomically: what several programs make of one number lies side by side and is summed in a fixed
order, so that two runs agree to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton.language as tl


def kept(
    seed: tl.tensor, rows: tl.tensor, first: tl.tensor, threshold: tl.tensor, BM: tl.constexpr, BK: tl.constexpr
) -> tl.tensor:
    """Return which elements of a tile dropout keeps, ``[BM, BK]``; ``first`` is the tile's first column.

    One Philox4x32 counter (Salmon et al. 2011, seven rounds) of (group of eight columns, row) gives eight numbers
    of 16 bits. A number below ``threshold`` (p in 65536ths) is dropped. The value depends on nothing but seed, row and
    column, so that any kernel can make any tile again.
    """
    groups = first // 8 + tl.arange(0, BK // 8)
    columns = tl.broadcast_to(groups[None, :], (BM, BK // 8)).to(tl.uint32)
    lines = tl.broadcast_to(rows[:, None], (BM, BK // 8)).to(tl.uint32)
    none = tl.zeros((BM, BK // 8), tl.uint32)
    a, b, c, d = tl.philox(seed, columns, lines, none, none, 7)
    low = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    high = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    return tl.reshape(tl.join(low, high), (BM, BK)).to(tl.int32) >= threshold


def mask(out: tl.tensor, seed: tl.tensor, M: tl.tensor, K: tl.tensor, threshold: tl.tensor, BM: tl.constexpr,
         BK: tl.constexpr) -> None:  # fmt: skip
    """Write the mask itself, ``out[M, K]`` of bytes, to compare it with others."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    cols = first + tl.arange(0, BK)
    keep = kept(tl.load(seed), rows, first, threshold, BM, BK)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + cols[None, :], keep.to(tl.int8), mask=inside)


def shrink(
    x: tl.tensor, A: tl.tensor, H: tl.tensor, seed: tl.tensor,
    M: tl.tensor, K: tl.tensor, R: tl.tensor, chunk: tl.tensor, threshold: tl.tensor, gain: tl.tensor,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, DROP: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``H[s] = gain * (mask * x) A^T`` over the s-th chunk of columns.

    The result is narrow (R columns), so that rows alone give too few programs when M is small: the columns of x are
    cut into chunks as well (split-K), whose sums lie side by side in ``H[splits, M, R]`` (ACC). x is ``[M, K]``, A
    ``[R, K]`` of any float dtype, ``chunk`` a multiple of BK, ``threshold`` p in 65536ths, ``gain`` 1 / (1 - p).
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    start = tl.program_id(1) * chunk
    x_rows = x + rows.to(tl.int64)[:, None] * K
    A_rows = A + ranks.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BR), ACC)
    for k in range(start, tl.minimum(start + chunk, K), BK):
        cols = k + tl.arange(0, BK)
        inside = (cols < K)[None, :]
        values = tl.load(x_rows + cols[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        if DROP:
            values = tl.where(kept(tl.load(seed), rows, k, threshold, BM, BK), values, 0.0)
        factor = tl.load(A_rows + cols[None, :], mask=(ranks < R)[:, None] & inside, other=0.0).to(values.dtype)
        acc = tl.dot(values.to(DOT), tl.trans(factor.to(DOT)), acc, input_precision=PRECISION, out_dtype=ACC)
    places = (tl.program_id(1).to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(H + places, acc * gain, mask=(rows < M)[:, None] & (ranks < R)[None, :])


def summed(H: tl.tensor, rows: tl.tensor, ranks: tl.tensor, last: tl.tensor, M: tl.tensor, R: tl.tensor,
           SPLITS: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Return a tile of ``H[splits, M, R]`` summed over the splits; ranks from ``last`` on count as zero."""
    inside = (rows < M)[:, None] & (ranks < last)[None, :]
    places = rows.to(tl.int64)[:, None] * R + ranks[None, :]
    total = tl.load(H + places, mask=inside, other=0.0).to(ACC)
    for _ in range(1, SPLITS):
        places += M * R
        total += tl.load(H + places, mask=inside, other=0.0)
    return total


def expand(
    y: tl.tensor, H: tl.tensor, B: tl.tensor, kept_H: tl.tensor,
    M: tl.tensor, N: tl.tensor, R: tl.tensor, first: tl.tensor, rank: tl.tensor, scale: tl.tensor,
    SPLITS: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Add ``scale * H B^T`` to y in place, ``H`` being ``rank`` columns of a wider one from ``first`` on.

    y is ``[M, N]``, H ``[splits, M, R]`` in ACC, B ``[N, rank]`` of any float dtype. With KEEP the sum over the splits
    is written to ``kept_H[M, R]``, in y's dtype, for the backward pass.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        h = summed(H, rows, first + ranks, first + rank, M, R, SPLITS, ACC).to(y.dtype.element_ty)
        places = cols.to(tl.int64)[:, None] * rank + ranks[None, :]
        b = tl.load(B + places, mask=(cols < N)[:, None] & (ranks < rank)[None, :], other=0.0).to(h.dtype)
        acc = tl.dot(h.to(DOT), tl.trans(b.to(DOT)), acc, input_precision=PRECISION, out_dtype=ACC)
        if KEEP and tl.program_id(1) == 0:
            inside = (rows < M)[:, None] & (ranks < rank)[None, :]
            tl.store(kept_H + rows.to(tl.int64)[:, None] * R + (first + ranks)[None, :], h, mask=inside)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    places = y + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(places, (tl.load(places, mask=inside, other=0.0) + scale * acc).to(y.dtype.element_ty), mask=inside)


def product(
    x: tl.tensor, W: tl.tensor, bias: tl.tensor, H: tl.tensor, B: tl.tensor, y: tl.tensor, kept_H: tl.tensor,
    M: tl.tensor, N: tl.tensor, K: tl.tensor, R: tl.tensor, first: tl.tensor, rank: tl.tensor, scale: tl.tensor,
    SPLITS: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Write ``y = x W^T + bias + scale * H B^T``: base and update in one pass, y written once and never read.

    Programs are numbered so that GROUP rows of tiles run together and share the tiles of W that they read. The other
    arguments are those of :func:`expand`; W is ``[N, K]``.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group, within = tl.program_id(0) // (GROUP * tiles_n), tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m, tile_n = group * GROUP + within % height, within // height
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    # Rows and columns beyond the edge are read from its other side and never written: no mask in the inner loop.
    x_rows = x + (rows % M).to(tl.int64)[:, None] * K
    W_rows = W + (cols % N).to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        a = tl.load(x_rows + depth[None, :], mask=(depth < K)[None, :], other=0.0)
        b = tl.load(W_rows + depth[None, :], mask=(depth < K)[None, :], other=0.0)
        acc = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), acc, input_precision=PRECISION, out_dtype=ACC)
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0)[None, :]
    update = tl.zeros((BM, BN), ACC)
    for r in range(0, rank, BR):
        ranks = r + tl.arange(0, BR)
        h = summed(H, rows, first + ranks, first + rank, M, R, SPLITS, ACC).to(y.dtype.element_ty)
        places = cols.to(tl.int64)[:, None] * rank + ranks[None, :]
        f = tl.load(B + places, mask=(cols < N)[:, None] & (ranks < rank)[None, :], other=0.0).to(h.dtype)
        update = tl.dot(h.to(DOT), tl.trans(f.to(DOT)), update, input_precision=PRECISION, out_dtype=ACC)
        if KEEP and tile_n == 0:
            inside = (rows < M)[:, None] & (ranks < rank)[None, :]
            tl.store(kept_H + rows.to(tl.int64)[:, None] * R + (first + ranks)[None, :], h, mask=inside)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    out = (acc + scale * update).to(y.dtype.element_ty)
    tl.store(y + rows.to(tl.int64)[:, None] * N + cols[None, :], out, mask=inside)


def output_gradients(
    gy: tl.tensor, B: tl.tensor, H: tl.tensor, gH: tl.tensor, gB: tl.tensor,
    M: tl.tensor, N: tl.tensor, R: tl.tensor, first: tl.tensor, rank: tl.tensor, chunk: tl.tensor, scale: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Compute ``scale * gy B`` and ``scale * gy^T H`` in a single pass over gy.

    A program reads BN columns of gy over a chunk of rows: its share of gH is one of ``[cdiv(N, BN), M, rank]``, its
    share of gB one of ``[cdiv(M, chunk), N, rank]``, both in ACC. gy is ``[M, N]``, B ``[N, rank]`` of any float dtype,
    H ``[M, R]`` in gy's dtype with B's columns from ``first`` on, ``chunk`` a multiple of BM.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    has_col, has_rank = cols < N, ranks < rank
    places = cols.to(tl.int64)[:, None] * rank + ranks[None, :]
    b = tl.load(B + places, mask=has_col[:, None] & has_rank[None, :], other=0.0).to(gy.dtype.element_ty).to(DOT)
    share = gH + tl.program_id(0).to(tl.int64) * M * rank
    start = tl.program_id(1) * chunk
    acc = tl.zeros((BN, BR), ACC)
    for m in range(start, tl.minimum(start + chunk, M), BM):
        rows = m + tl.arange(0, BM)
        lines = rows.to(tl.int64)[:, None]
        g = tl.load(gy + lines * N + cols[None, :], mask=(rows < M)[:, None] & has_col[None, :], other=0.0).to(DOT)
        inside = (rows < M)[:, None] & has_rank[None, :]
        part = tl.dot(g, b, input_precision=PRECISION, out_dtype=ACC)
        tl.store(share + lines * rank + ranks[None, :], scale * part, mask=inside)
        h = tl.load(H + lines * R + (first + ranks)[None, :], mask=inside, other=0.0).to(DOT)
        acc = tl.dot(tl.trans(g), h, acc, input_precision=PRECISION, out_dtype=ACC)
    share = gB + tl.program_id(1).to(tl.int64) * N * rank
    tl.store(share + places, scale * acc, mask=has_col[:, None] & has_rank[None, :])


def input_gradients(
    x: tl.tensor, A: tl.tensor, gH: tl.tensor, gx: tl.tensor, gA: tl.tensor, seed: tl.tensor,
    M: tl.tensor, K: tl.tensor, R: tl.tensor, first: tl.tensor, chunk: tl.tensor, threshold: tl.tensor,
    gain: tl.tensor,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, DROP: tl.constexpr,
    NEED_X: tl.constexpr, NEED_A: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Add ``gain * mask * (gH A)`` to gx in place and compute ``gain * gH^T (mask * x)``, the mask made once for both.

    Ranks from ``first`` to ``first + BR`` only; a program has BK columns and a chunk of rows, and its share of gA is
    one of ``[cdiv(M, chunk), R, K]`` in ACC. x and gx are ``[M, K]``, A is ``[R, K]`` of any float dtype, gH ``[M, R]``
    in x's dtype, ``chunk`` a multiple of BM; NEED_X and NEED_A say which of the two is wanted.
    """
    begin = tl.program_id(0) * BK
    cols = begin + tl.arange(0, BK)
    ranks = first + tl.arange(0, BR)
    has_col, has_rank = cols < K, ranks < R
    places = ranks.to(tl.int64)[:, None] * K + cols[None, :]
    a = tl.load(A + places, mask=has_rank[:, None] & has_col[None, :], other=0.0).to(x.dtype.element_ty).to(DOT)
    start = tl.program_id(1) * chunk
    acc = tl.zeros((BK, BR), ACC)
    for m in range(start, tl.minimum(start + chunk, M), BM):
        rows = m + tl.arange(0, BM)
        lines = rows.to(tl.int64)[:, None]
        inside = (rows < M)[:, None] & has_col[None, :]
        g = tl.load(gH + lines * R + ranks[None, :], mask=(rows < M)[:, None] & has_rank[None, :], other=0.0).to(DOT)
        if DROP:
            keep = kept(tl.load(seed), rows, begin, threshold, BM, BK)
        if NEED_X:
            part = gain * tl.dot(g, a, input_precision=PRECISION, out_dtype=ACC)
            if DROP:
                part = tl.where(keep, part, 0.0)
            spots = gx + lines * K + cols[None, :]
            tl.store(spots, (tl.load(spots, mask=inside, other=0.0) + part).to(gx.dtype.element_ty), mask=inside)
        if NEED_A:
            values = tl.load(x + lines * K + cols[None, :], mask=inside, other=0.0)
            if DROP:
                values = tl.where(keep, values, 0.0)
            acc = tl.dot(tl.trans(values.to(DOT)), g, acc, input_precision=PRECISION, out_dtype=ACC)
    if NEED_A:
        share = gA + tl.program_id(1).to(tl.int64) * R * K
        tl.store(share + places, tl.trans(gain * acc), mask=has_rank[:, None] & has_col[None, :])
