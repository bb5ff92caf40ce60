"""What each way of :mod:`lorakit.kernels.routed` costs, and which is cheapest: nothing is timed at run time.

    time = a + b * pieces + c * products + d * weights + e * rows        [microseconds]

with the coefficients of ``routed_costs.json``, which ``benchmarks/make_cost_table.py`` fits to measured times, for each
device type, dtype, and with or without a backward pass.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import torch

from lorakit.kernels.routed import Pairs
from lorakit.kernels.segments import Segments

# A dtype without measurements costs about what its like costs.
_LIKE = {"float64": "float32", "float16": "bfloat16"}


@dataclass(frozen=True)
class Problem:
    """The sizes that decide what a routed product costs.

    Attributes:
        num: rows of any group; ``num_groups``, ``num_runs`` and ``widest`` as in :class:`Segments`.
        rank_rows: the sum over these rows of their group's rank.
        sum_ranks, block_rank: of all groups together; of each where one rank is needed.
        d_in, d_out: the layer's width.
        sorted: whether the rows lie sorted already.
        covers: whether every row is of a group.
        element_bytes: of one number.
    """

    num: int
    num_groups: int
    num_runs: int
    widest: int
    rank_rows: int
    sum_ranks: int
    block_rank: int
    d_in: int
    d_out: int
    sorted: bool
    covers: bool
    element_bytes: int

    @classmethod
    def of(cls, pairs: Pairs, segments: Segments) -> Problem:
        """Return the sizes of a problem."""
        return cls(
            num=segments.num,
            num_groups=segments.num_groups,
            num_runs=segments.num_runs,
            widest=segments.widest,
            rank_rows=sum(rank * count for rank, count in zip(pairs.ranks, segments.counts, strict=True)),
            sum_ranks=sum(pairs.ranks),
            block_rank=pairs.block_rank,
            d_in=pairs.d_in,
            d_out=pairs.d_out,
            sorted=segments.start is not None,
            covers=segments.covers,
            element_bytes=pairs.dtype.itemsize,
        )

    def work(self, way: str) -> tuple[float, float, float, float, float]:
        """Return what a way does: ``(1, pieces, products in M, weights read in MB, rows moved in MB)``."""
        wide = self.d_in + self.d_out
        own = self.sum_ranks
        gather, scatter = (0, 2 * self.d_out) if self.sorted else (2 * self.d_in, 3 * self.d_out)
        if way == "runs":
            pieces, products = self.num_runs, self.rank_rows
            weights, rows = own / self.num_groups * self.num_runs, self.num * (self.d_in + 2 * self.d_out)
        elif way == "loop":
            pieces, products, weights = self.num_groups, self.rank_rows, own
            rows = self.num * (wide + gather + scatter)
        elif way == "grouped":
            pieces, products, weights = self.num_groups, self.num * self.block_rank, self.block_rank * self.num_groups
            rows = self.num * (wide + gather + scatter)
        elif way == "padded":
            filled = self.num_groups * self.widest
            even = filled == self.num
            pieces, products, weights = self.num_groups, filled * self.block_rank, self.block_rank * self.num_groups
            fill = 0 if even and self.sorted else 2 * self.d_in * filled
            rows = filled * wide + fill + self.num * (scatter + (0 if even else 2 * self.d_out))
        else:
            pieces, products, weights = 1, self.num * own, own
            moved = 2 * self.d_out if self.covers else gather + self.d_out + scatter
            rows = self.num * (self.d_in + moved + 3 * own)
        mega = self.element_bytes / 1e6
        return 1.0, float(pieces), products * wide / 1e6, weights * wide * mega, rows * mega


@functools.lru_cache(maxsize=4096)
def cheapest(ways: tuple[str, ...], problem: Problem, device: torch.device, dtype: torch.dtype, trained: bool) -> str:
    """Return the way that costs least; ``trained`` says whether a backward pass follows."""
    costs = coefficients(device.type, str(dtype).removeprefix("torch."), trained)
    return min(ways, key=lambda way: predicted_us(costs[way], problem, way))


def predicted_us(coefficients: Iterable[float], problem: Problem, way: str) -> float:
    """Return the time that a way takes, in microseconds."""
    return sum(cost * amount for cost, amount in zip(coefficients, problem.work(way), strict=True))


@functools.cache
def coefficients(device: str, dtype: str, trained: bool) -> dict[str, tuple[float, ...]]:
    """Return each way's coefficients; of a device type without measurements, those named 'other'."""
    table = json.loads(resources.files("lorakit.kernels").joinpath("routed_costs.json").read_text(encoding="utf-8"))
    costs = table["costs"]
    of_device = costs.get(device, costs["other"])
    found = of_device[_LIKE.get(dtype, dtype)]["trained" if trained else "inference"]
    return {way: tuple(values) for way, values in found.items()}
