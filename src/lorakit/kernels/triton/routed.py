"""Routed batches on Triton's kernels: each row has its own adapter or none, ranks and scales may differ.

    y_s[i] += scale[s, g] * B[s, g] A[s, g] x[i]        g = ids[i], the slices s read the same x (q, k, v; gate, up)

Shrinking and expanding by segments is Punica's SGMV, by rows its BGMV (Chen et al. 2023, arXiv 2310.18547). Here the
rows stay where they are, adapters are neither stacked nor padded, sums are split without atomic additions, and segments
can be trained. A row with the id -1 is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.errors import ShapeError
from lorakit.kernels.linear import Pair
from lorakit.kernels.triton.launch import (
    Tiles,
    accumulator,
    addresses,
    arithmetic,
    cdiv,
    compiled,
    integers,
    kind,
    numbers,
    positions,
    tiles_for,
)

MAX_SLICES = 3  # outputs of one launch


@dataclass(frozen=True)
class Route:
    """Rows in the order of their adapters, cut into tiles; made once per forward pass, without waiting for the device.

    Attributes:
        order: ``[T]`` which row stands at each place; rows of no adapter come first.
        starts: ``[G + 1]`` where each adapter's rows begin.
        tile_adapter: whose rows each tile holds, -1 for none: their number must not depend on the ids' values.
        tile_start: the place where each tile begins.
        tile_rows: rows of a tile.
    """

    order: Tensor
    starts: Tensor
    tile_adapter: Tensor
    tile_start: Tensor
    tile_rows: int

    @staticmethod
    def of(ids: Tensor, num_adapters: int, tile_rows: int = 16) -> Route:
        """Sort rows by adapter.

        >>> route = Route.of(torch.tensor([1, -1, 0, 1]), num_adapters=2)
        >>> route.order.tolist(), route.starts.tolist()
        ([1, 2, 0, 3], [1, 2, 4])

        Args:
            ids: ``[T]`` the number of each row's adapter, -1 for none.
            num_adapters: G; ids are below it.
            tile_rows: rows of a tile, a power of two, 16 at least.
        """
        found, order = torch.sort(ids.long(), stable=True)
        numbers_ = torch.arange(num_adapters + 1, device=ids.device)
        starts = torch.searchsorted(found, numbers_)
        tiles = (starts.diff() + tile_rows - 1) // tile_rows
        ends = tiles.cumsum(0)
        most = cdiv(len(ids), tile_rows) + min(num_adapters, len(ids))
        tile = torch.arange(most, device=ids.device)
        adapter = torch.searchsorted(ends, tile, right=True)
        inside = adapter < num_adapters
        adapter = adapter.clamp(max=num_adapters - 1)
        begin = starts[adapter] + (tile - (ends - tiles)[adapter]) * tile_rows
        return Route(
            order=order.int(),
            starts=starts.int(),
            tile_adapter=torch.where(inside, adapter, -1).int(),
            tile_start=begin.int(),
            tile_rows=tile_rows,
        )


@dataclass(frozen=True)
class Shape:
    """What a call does beside its tensors.

    Attributes:
        scales: of each slice, each adapter's factor.
        ranks: of each slice, each adapter's rank, 0 where it has none there.
        route: whose row is whose.
        tiles: how the work is cut.
        keep: whether a backward pass may follow.
    """

    scales: tuple[tuple[float, ...], ...]
    ranks: tuple[tuple[int, ...], ...]
    route: Route
    tiles: Tiles
    keep: bool = True

    @property
    def most(self) -> int:
        """The largest rank, 1 at least."""
        return max(1, max(max(ranks) for ranks in self.ranks))


def routed_linear(
    x: Tensor,
    outs: Sequence[Tensor],
    pairs: Sequence[Sequence[Pair | None]],
    route: Route,
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """Add each row's own update to the base's outputs, in place, and return them (SGMV).

    Args:
        x: ``[T, d_in]``, in the outputs' dtype.
        outs: for each slice the base's output ``[T, d_out]``, contiguous: changed in place.
        pairs: for each slice the adapters' pairs, None where an adapter has none there.
        route: whose row is whose.
        tiles: how the work is cut; None chooses by dtype and device.

    Returns:
        The outputs, differentiable in x, in themselves and in every pair.

    Raises:
        ShapeError: tensors do not fit each other.
    """
    _check(x, outs, pairs)
    if len(outs) > MAX_SLICES:
        rest = routed_linear(x, outs[MAX_SLICES:], pairs[MAX_SLICES:], route, tiles)
        return [*routed_linear(x, outs[:MAX_SLICES], pairs[:MAX_SLICES], route, tiles), *rest]
    couples = [(None, None) if pair is None else (pair.A, pair.B) for row in pairs for pair in row]
    factors = [factor for couple in couples for factor in couple]
    tensors = [x, *outs, *(factor for factor in factors if factor is not None)]
    shape = Shape(
        scales=tuple(tuple(0.0 if pair is None else pair.scale for pair in row) for row in pairs),
        ranks=tuple(tuple(0 if pair is None else pair.A.shape[0] for pair in row) for row in pairs),
        route=route,
        tiles=tiles or tiles_for(x),
        keep=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )
    return list(cast("Any", _Routed).apply(shape, len(outs), x, *outs, *factors))


def routed_rows(
    x: Tensor,
    outs: Sequence[Tensor],
    pairs: Sequence[Sequence[Pair | None]],
    ids: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Add each row's own update to the base's outputs, in place, row by row (BGMV): for decoding, without gradients.

    Args:
        x: ``[T, d_in]``, in the outputs' dtype.
        outs: for each slice the base's output ``[T, d_out]``, contiguous: changed in place.
        pairs: for each slice the adapters' pairs, None where an adapter has none there.
        ids: ``[T]`` int32, the number of each row's adapter, -1 for none.
        tiles: how the work is cut; None chooses by dtype and device.

    Raises:
        ShapeError: tensors do not fit each other.
    """
    _check(x, outs, pairs)
    for start in range(0, len(outs), MAX_SLICES):
        part = slice(start, start + MAX_SLICES)
        _rows(x.contiguous(), outs[part], pairs[part], ids.int(), tiles or tiles_for(x))


@torch.no_grad()
def _rows(x: Tensor, outs: Sequence[Tensor], pairs: Sequence[Sequence[Pair | None]], ids: Tensor, tiles: Tiles) -> None:
    (T, D), slices, G, device = x.shape, len(outs), len(pairs[0]), x.device
    flat = [pair for row in pairs for pair in row]
    sizes = tuple(0 if pair is None else pair.A.shape[0] for pair in flat)
    factors_A = contiguous([None if pair is None else pair.A for pair in flat])
    factors_B = contiguous([None if pair is None else pair.B for pair in flat])
    (A, how_A), (B, how_B) = _table(factors_A, device), _table(factors_B, device)
    ranks, R = integers(sizes, device), max(1, *sizes)
    scales = numbers(tuple(0.0 if pair is None else pair.scale for pair in flat), device)
    BR = tiles.rank_block(R)
    BK, BN = 4096 // BR, 2048 // BR
    chunk = tiles.share(D, BK, T * slices)
    H = torch.empty(cdiv(D, chunk), slices, T, R, dtype=accumulator(x.dtype), device=device)
    code, how = compiled("device_routed"), {"SLICES": slices, "BR": BR, "ACC": kind(H.dtype), **tiles.launch()}
    code.row_shrink[(T, H.shape[0], slices)](x, H, A, ranks, ids, T, D, R, G, chunk, BK=BK, **how_A, **how)
    widest = max(out.shape[1] for out in outs)
    code.row_expand[(T, cdiv(widest, BN), slices)](
        *_three(outs), H, B, ranks, scales, ids, T, R, G, SPLITS=H.shape[0], BN=BN, **how_B, **how
    )


class _Routed(torch.autograd.Function):
    """See :func:`routed_linear`."""

    @staticmethod
    def forward(ctx: Any, shape: Shape, slices: int, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outs = [cast(Tensor, tensor) for tensor in tensors[:slices]]
        factors = contiguous(tensors[slices:])
        x = x.contiguous()
        H = shrink(x, factors[0::2], shape, range(slices), scaled=False, rank_first=True)
        expand(outs, H, factors[1::2], shape, range(slices), scaled=True, rank_first=False)
        ctx.shape, ctx.slices = shape, slices
        ctx.mark_dirty(*outs)
        ctx.save_for_backward(x, H.sum(0).to(x.dtype) if shape.keep else None, *tensors[slices:])
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape: Shape = ctx.shape
        x, H, *saved = ctx.saved_tensors
        factors, count = contiguous(saved), len(shape.ranks[0])
        needs = ctx.needs_input_grad[3 + ctx.slices :]
        gx = torch.zeros_like(x) if ctx.needs_input_grad[2] else None
        gys = [grad.contiguous() for grad in grads]
        found: list[Tensor | None] = [None] * len(factors)
        for index, gy in enumerate(gys):
            own = slice(2 * count * index, 2 * count * (index + 1))
            A, B = factors[own][0::2], factors[own][1::2]
            wanted = (any(needs[own][0::2]), any(needs[own][1::2]))
            gA, gB = gradients(gy, x, H[index], A, B, shape, index, gx, wanted)
            if gA:
                found[own.start : own.stop : 2] = gA
            if gB:
                found[own.start + 1 : own.stop : 2] = gB
        cast_ = [
            None if grad is None or like is None or not need else grad.to(like.dtype)
            for grad, like, need in zip(found, factors, needs, strict=True)
        ]
        return None, None, gx, *gys, *cast_


def gradients(
    gy: Tensor, x: Tensor, h: Tensor, A: Sequence[Tensor | None], B: Sequence[Tensor | None], shape: Shape, index: int,
    gx: Tensor | None, wanted: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Return the gradients of a slice's A and B, unrounded; add x's to ``gx``.

    Args:
        gy: ``[T, d_out]`` the gradient of the slice's output.
        x: ``[T, d_in]``.
        h: ``[T, R]`` of the forward pass, in sorted order and x's dtype.
        A: the adapters' down factors.
        B: the adapters' up factors.
        shape: what the forward pass did.
        index: the slice's number.
        gx: ``[T, d_in]``, changed in place, or None where nobody wants it.
        wanted: whether the gradients of A are wanted, and those of B; else there are none.
    """
    here, ranks = range(index, index + 1), shape.ranks[index]
    gH = shrink(gy, B, shape, here, scaled=True, rank_first=False)
    if gx is not None:
        expand([gx], gH, A, shape, here, scaled=False, rank_first=True)
    found_A, found_B = [], []
    if wanted[0]:
        gA = outer(gH.sum(0)[0].to(x.dtype), x, shape, index, scaled=False, rank_first=True)
        found_A = [own[:rank] for own, rank in zip(gA, ranks, strict=True)]
    if wanted[1]:
        gB = outer(h, gy, shape, index, scaled=True, rank_first=False)
        found_B = [own[:, :rank] for own, rank in zip(gB, ranks, strict=True)]
    return found_A, found_B


def shrink(
    x: Tensor, factors: Sequence[Tensor | None], shape: Shape, slices: range, scaled: bool, rank_first: bool
) -> Tensor:
    """Return ``H[splits, slices, T, R]`` of x times the factors of these slices, in sorted order."""
    (T, D), route, tiles, device = x.shape, shape.route, shape.tiles, x.device
    BR, BK, num_tiles = tiles.rank_block(shape.most), tiles.depth, len(route.tile_adapter)
    chunk = tiles.share(D, BK, num_tiles * len(slices))
    H = torch.empty(cdiv(D, chunk), len(slices), T, shape.most, dtype=accumulator(x.dtype), device=device)
    table, how = _table(factors, device)
    compiled("device_routed").segment_shrink[(num_tiles, H.shape[0], len(slices))](
        x, H, table, *_per_adapter(shape, slices, device), route.order, route.starts, route.tile_adapter,
        route.tile_start, T, D, shape.most, len(shape.ranks[0]), chunk, SCALED=scaled, RANK_FIRST=rank_first,
        **how, SLICES=len(slices), BM=route.tile_rows, BK=BK, BR=BR,
        **arithmetic(x.dtype), **tiles.launch(),
    )  # fmt: skip
    return H


def expand(
    outs: Sequence[Tensor], H: Tensor, factors: Sequence[Tensor | None], shape: Shape, slices: range, scaled: bool,
    rank_first: bool,
) -> None:  # fmt: skip
    """Add H times the factors of these slices to the rows of the outputs."""
    route, tiles, device = shape.route, shape.tiles, H.device
    table, how = _table(factors, device)
    blocks = cdiv(max(out.shape[1] for out in outs), tiles.columns)
    compiled("device_routed").segment_expand[(len(route.tile_adapter), blocks, len(slices))](
        *_three(outs), H, table, *_per_adapter(shape, slices, device), route.order, route.starts, route.tile_adapter,
        route.tile_start, H.shape[2], shape.most, len(shape.ranks[0]), SCALED=scaled, RANK_FIRST=rank_first,
        **how, SLICES=len(slices), SPLITS=H.shape[0], BM=route.tile_rows, BN=tiles.columns,
        BR=tiles.rank_block(shape.most), **arithmetic(outs[0].dtype), **tiles.launch(),
    )  # fmt: skip


def outer(H: Tensor, v: Tensor, shape: Shape, index: int, scaled: bool, rank_first: bool) -> Tensor:
    """Return ``H^T v`` of every adapter, ``[G, R, D]``, or ``[G, D, R]`` without ``rank_first``."""
    D, R, G, tiles = v.shape[1], shape.most, len(shape.ranks[0]), shape.tiles
    BR = tiles.rank_block(R)
    across = cdiv(D, tiles.columns) * cdiv(R, BR) * G
    splits = max(1, min(cdiv(v.shape[0], shape.route.tile_rows), tiles.programs // across))
    out = torch.empty(splits, G, *((R, D) if rank_first else (D, R)), dtype=accumulator(v.dtype), device=v.device)
    ranks, scales = _per_adapter(shape, range(index, index + 1), v.device)
    compiled("device_routed").segment_outer[(cdiv(D, tiles.columns), G, splits * cdiv(R, BR))](
        H, v, out, ranks, scales, shape.route.order, shape.route.starts, D, R, G, SCALED=scaled, RANK_FIRST=rank_first,
        BM=shape.route.tile_rows, BK=tiles.columns, BR=BR, SPLITS=splits,
        **arithmetic(v.dtype), **tiles.launch(),
    )  # fmt: skip
    return out.sum(0)


def _per_adapter(shape: Shape, slices: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ranks and scales of these slices, one after the other."""
    ranks = integers(tuple(rank for index in slices for rank in shape.ranks[index]), device)
    return ranks, numbers(tuple(scale for index in slices for scale in shape.scales[index]), device)


def _table(factors: Sequence[Tensor | None], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Return the factors' addresses, and what kernels must know of them: dtype, and what divides every address."""
    dtype = next((factor.dtype for factor in factors if factor is not None), torch.float32)
    places = positions(factors)
    aligned = all(place % 16 == 0 for place in places)
    return addresses(places, device), {"DTYPE": kind(dtype), "ALIGN": 16 if aligned else dtype.itemsize}


def _three(outs: Sequence[Tensor]) -> list[Any]:
    """Return three outputs and their widths, the last one again where there are fewer."""
    three = [*outs, *[outs[-1]] * (MAX_SLICES - len(outs))]
    return [*three, *(out.shape[1] for out in three)]


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return tensors whose rows lie one after the other, copied where they did not."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _check(x: Tensor, outs: Sequence[Tensor], pairs: Sequence[Sequence[Pair | None]]) -> None:
    """Raise a ShapeError that names everything that does not fit."""
    found = []
    if not outs or len(outs) != len(pairs) or not pairs[0] or len({len(row) for row in pairs}) > 1:
        found.append(f"{len(outs)} outputs and pairs for {[len(row) for row in pairs]} adapters per slice")
    dtypes = {factor.dtype for row in pairs for pair in row if pair for factor in (pair.A, pair.B)}
    if len(dtypes) > 1:
        found.append(f"factors of several dtypes, {sorted(map(str, dtypes))}: one launch reads one")
    for index, (out, row) in enumerate(zip(outs, pairs, strict=False)):
        if out.dtype != x.dtype or out.shape[:1] != x.shape[:1] or out.dim() != 2 or not out.is_contiguous():
            size = f"output {list(out.shape)} of {out.dtype}"
            found.append(f"slice {index}: {size}, not a contiguous [{len(x)}, d_out] of {x.dtype}")
        for adapter, pair in enumerate(row):
            if pair and (pair.A.shape != (pair.B.shape[1], x.shape[1]) or pair.B.shape[0] != out.shape[-1]):
                sizes = f"A {list(pair.A.shape)}, B {list(pair.B.shape)}, x {list(x.shape)}, output {list(out.shape)}"
                found.append(f"slice {index}, adapter {adapter}: {sizes} do not fit")
    if found:
        raise ShapeError("; ".join(found))
