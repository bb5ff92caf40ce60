"""Routed batches against float64: by segments (SGMV) with gradients, row by row (BGMV) without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lorakit.errors import ShapeError
from lorakit.kernels.triton.launch import Tiles
from lorakit.kernels.triton.routed import Pair, Route, routed_linear, routed_rows

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # as in test_linear.py
TILES = Tiles(rows=32, columns=32, depth=32, ranks=16, programs=12)
D_IN = 40
IDS = (
    0,
    2,
    -1,
    2,
    2,
    0,
    4,
    -1,
    4,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    2,
    -1,
)  # 1 and 3 have no rows; 2 has two tiles

# Ranks of each slice's adapters; 0 where an adapter has nothing there.
RANKS = {
    "one layer": ((5, 3, 20, 1, 8),),
    "q, k, v": ((5, 3, 2, 1, 8), (5, 3, 0, 1, 2), (0, 3, 2, 1, 8)),
    "more than one launch": ((2, 0, 1, 0, 0),) * 4,
}


def pairs_of(
    ranks: Sequence[Sequence[int]], d_outs: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[list[Pair | None]]:
    """Draw the pairs; scales differ by slice and adapter."""

    def pair(rank: int, d_out: int, scale: float) -> Pair | None:
        A = (torch.randn(rank, D_IN, device=device) / D_IN**0.5).to(dtype).requires_grad_()
        B = (torch.randn(d_out, rank, device=device) / max(rank, 1) ** 0.5).to(dtype).requires_grad_()
        return Pair(A, B, scale) if rank else None

    return [
        [pair(rank, d_out, 0.5 + s + g) for g, rank in enumerate(row)]
        for s, (row, d_out) in enumerate(zip(ranks, d_outs, strict=True))
    ]


def drawn(
    ranks: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.float32, num_rows: int = len(IDS)
) -> tuple[Tensor, list[Tensor], list[list[Pair | None]]]:
    """Draw x, the base's outputs (of different widths) and the pairs."""
    d_outs = [33, 20, 7, 16][: len(ranks)]
    x = torch.randn(num_rows, D_IN, device=device).to(dtype)
    outs = [torch.randn(num_rows, d_out, device=device).to(dtype) for d_out in d_outs]
    return x, outs, pairs_of(ranks, d_outs, torch.float32, device)


def by_segments(x: Tensor, outs: list[Tensor], pairs: list[list[Pair | None]], ids: Tensor) -> None:
    routed_linear(x, outs, pairs, Route.of(ids, len(pairs[0])), TILES)


def by_rows(x: Tensor, outs: list[Tensor], pairs: list[list[Pair | None]], ids: Tensor) -> None:
    routed_rows(x, outs, pairs, ids, TILES)


Compute = Callable[[Tensor, list[Tensor], list[list[Pair | None]], Tensor], None]
BOTH = pytest.mark.parametrize("compute", [by_segments, by_rows])


def wanted(x: Tensor, outs: list[Tensor], pairs: list[list[Pair | None]], ids: Tensor) -> list[Tensor]:
    """Return the outputs in float64, differentiable in float64 copies of x and the factors given as such."""
    results = []
    for out, row in zip(outs, pairs, strict=True):
        total = out.double()
        for adapter, pair in enumerate(row):
            if pair is not None:
                on = (ids == adapter).double()[:, None]
                total = total + on * pair.scale * (x.double() @ pair.A.double().t()) @ pair.B.double().t()
        results.append(total)
    return results


def rounded(pairs: list[list[Pair | None]], dtype: torch.dtype) -> list[list[Pair | None]]:
    """Return float64 leaves with the factors as the kernels round them."""

    def leaf(factor: Tensor) -> Tensor:
        return factor.detach().to(dtype).double().requires_grad_()

    return [[None if pair is None else Pair(leaf(pair.A), leaf(pair.B), pair.scale) for pair in row] for row in pairs]


def error(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of what is wanted (or over 1 where that is nothing)."""
    return ((found.double() - reference).norm() / (reference.norm() or 1.0)).item()


@BOTH
@pytest.mark.parametrize(
    "ranks",
    [
        RANKS["q, k, v"],
        pytest.param(RANKS["one layer"], marks=pytest.mark.slow),
        pytest.param(RANKS["more than one launch"], marks=pytest.mark.slow),
    ],
    ids=["q, k, v", "one layer", "more than one launch"],
)
@torch.no_grad()
def test_every_row_gets_its_own_update(device: torch.device, compute: Compute, ranks: Sequence[Sequence[int]]) -> None:
    num_rows = len(IDS) if compute is by_segments else 7  # row by row, more rows are only more of the same
    x, outs, pairs = drawn(ranks, device, num_rows=num_rows)
    ids = torch.tensor(IDS[:num_rows], device=device)
    reference = wanted(x, outs, rounded(pairs, x.dtype), ids)
    compute(x, outs, pairs, ids)
    errors = [error(out, target) for out, target in zip(outs, reference, strict=True)]
    assert max(errors) < TOLERANCE[torch.float32], errors


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@torch.no_grad()
def test_half_precision_is_rounded_only_as_told(device: torch.device, compute: Compute, dtype: torch.dtype) -> None:
    x, outs, pairs = drawn(((5, 20),), device, dtype, num_rows=7)
    ids = torch.tensor([0, 1, 1, -1, 0, 1, 1], device=device)
    reference = wanted(x, outs, rounded(pairs, dtype), ids)
    compute(x, outs, pairs, ids)
    assert error(outs[0], reference[0]) < TOLERANCE[dtype]


@BOTH
@torch.no_grad()
def test_rows_without_adapter_keep_every_bit(device: torch.device, compute: Compute) -> None:
    x, (out,), pairs = drawn(((5, 3),), device, num_rows=5)
    ids = torch.tensor([-1, 0, 1, -1, 0], device=device)
    free = ids == -1
    x[free] = torch.nan  # what these rows hold must not reach others either
    out[free] = -0.0  # an addition of nothing would make it +0.0
    before = out.clone()
    compute(x, [out], pairs, ids)
    assert torch.equal(out[free].view(torch.int32), before[free].view(torch.int32))
    assert out[~free].isfinite().all()


@BOTH
@torch.no_grad()
def test_a_batch_without_any_adapter_is_left_alone(device: torch.device, compute: Compute) -> None:
    x, outs, pairs = drawn(((5, 3),), device, num_rows=3)
    before = outs[0].clone()
    compute(x, outs, pairs, torch.full((3,), -1, device=device))
    assert torch.equal(outs[0], before)


@torch.no_grad()
def test_a_row_s_result_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    x, (out,), pairs = drawn(((5, 3, 20),), device)
    ids = torch.tensor(IDS[:6] * 4, device=device).clamp(max=2)
    alone = out[3:4].clone()
    by_segments(x, [out], pairs, ids)
    routed_linear(x[3:4], [alone], pairs, Route.of(ids[3:4], 3), TILES)
    # Another number of tiles is another split of the same sum: a rounding each, no more.
    assert error(out[3:4], alone.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_gradients_are_those_of_float64(device: torch.device, dtype: torch.dtype) -> None:
    x, outs, pairs = drawn(RANKS["q, k, v"], device, dtype)
    ids = torch.tensor(IDS, device=device)
    leaves = [x.requires_grad_(), *(out.requires_grad_() for out in outs)]
    results = routed_linear(x, [out * 1 for out in outs], pairs, Route.of(ids, 5), TILES)
    gys = [torch.randn_like(result) for result in results]
    torch.autograd.backward(results, gys)
    exact, x64 = rounded(pairs, dtype), x.detach().double().requires_grad_()
    torch.autograd.backward(wanted(x64, [out.detach() for out in outs], exact, ids), [gy.double() for gy in gys])
    errors = {"x": error(leaves[0].grad, x64.grad)}
    for s, (row, targets) in enumerate(zip(pairs, exact, strict=True)):
        for g, (pair, target) in enumerate(zip(row, targets, strict=True)):
            if pair is not None:
                errors[f"A {s} {g}"] = error(pair.A.grad, target.A.grad)
                errors[f"B {s} {g}"] = error(pair.B.grad, target.B.grad)
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert all(torch.equal(leaf.grad, gy) for leaf, gy in zip(leaves[1:], gys, strict=True))


def test_what_memory_held_before_does_not_matter(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        x, outs, pairs = drawn(((0, 3, 2),), device)
        results = routed_linear(x, outs, pairs, Route.of(torch.tensor(IDS, device=device).clamp(max=2), 3), TILES)
        results[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert results[0].isfinite().all()
    assert all(f.grad.isfinite().all() for pair in pairs[0] if pair for f in (pair.A, pair.B))


@pytest.mark.parametrize("ids", [[0], [-1, -1], [1] * 40, [2, 0, -1, 2, 0, 2], list(range(20)), []])
def test_every_row_with_an_adapter_is_in_exactly_one_tile(ids: list[int]) -> None:
    route = Route.of(torch.tensor(ids, dtype=torch.int64), num_adapters=20, tile_rows=16)
    seen = []
    for adapter, start in zip(route.tile_adapter.tolist(), route.tile_start.tolist(), strict=True):
        if adapter >= 0:
            stop = min(start + route.tile_rows, int(route.starts[adapter + 1]))
            seen += [(row, adapter) for row in route.order[start:stop].tolist()]
    assert sorted(seen) == [(row, adapter) for row, adapter in enumerate(ids) if adapter >= 0]


def test_every_misfit_is_named_at_once(device: torch.device) -> None:
    x, outs, pairs = drawn(((5, 3), (2, 2)), device)
    pairs[1][0] = Pair(pairs[1][0].A.double(), pairs[1][0].B, 1.0)
    with pytest.raises(ShapeError, match=r"several dtypes.*slice 0: output .*slice 1, adapter 1: A "):
        routed_linear(x, [outs[0].t(), outs[1][:, 1:].contiguous()], pairs, Route.of(torch.tensor(IDS), 2))
