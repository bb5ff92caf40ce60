"""``Segments``: which rows of an input belong to which of several groups, sorted once for all layers of a forward.

The rows of a group stay in their order. Rows of no group are in none of the index tensors, so that whatever
is computed from these leaves them alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class Segments:
    """The rows of ``num_groups`` groups among ``total`` rows.

    >>> segments = Segments(torch.tensor([1, -1, 0, 1]), 2)
    >>> segments.order.tolist(), segments.counts, segments.runs
    ([2, 0, 3], (1, 2), ((1, 1), (-1, 1), (0, 1), (1, 1)))

    Attributes:
        total: all rows, of groups or not.
        num: rows of any group.
        counts: rows of each group.
        widest: rows of the largest group.
        runs: rows beside each other in one group, as they lie: ``(group or -1, rows)``, all rows together.
        num_runs: how many of these are of a group.
        order: ``[num]`` rows sorted by group, on ``device``.
        start: the first row where all rows are sorted already and beside each other, else None.
        memo: what follows from the segments and is wanted again, by whoever computes it.
    """

    def __init__(self, codes: Tensor, num_groups: int, device: torch.device | str = "cpu") -> None:
        """Sort rows by group.

        Args:
            codes: ``[total]`` integers on the CPU, the group of each row, -1 for none; no group is empty.
            num_groups: how many groups there are.
            device: where the index tensors are needed.
        """
        self.total = len(codes)
        self.device = torch.device(device)
        ordered, places = torch.sort(codes, stable=True)
        self.num = int((ordered >= 0).sum())
        places = places[self.total - self.num :]
        self._groups = ordered[self.total - self.num :]
        self.counts: tuple[int, ...] = tuple(torch.bincount(self._groups, minlength=num_groups).tolist())
        self.widest = max(self.counts, default=0)
        values, lengths = torch.unique_consecutive(codes, return_counts=True)
        self.runs: tuple[tuple[int, int], ...] = tuple(zip(values.tolist(), lengths.tolist(), strict=True))
        self.num_runs = sum(group >= 0 for group, _ in self.runs)
        first = int(places[0]) if self.num else 0
        in_place = torch.equal(places, torch.arange(first, first + self.num))
        self.start = first if in_place else None
        self.order = places.to(self.device)
        self._places, self._codes = places, codes
        self.memo: dict[Any, Any] = {}

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return len(self.counts)

    @property
    def covers(self) -> bool:
        """Whether every row is of a group."""
        return self.num == self.total

    @functools.cached_property
    def run_sizes(self) -> list[int]:
        """Rows of each run, as ``Tensor.split`` takes them."""
        return [size for _, size in self.runs]

    @functools.cached_property
    def ends(self) -> Tensor:
        """``[num_groups]`` int32, where each group ends among the sorted rows."""
        return torch.tensor(self.counts).cumsum(0).to(self.device, torch.int32)

    @functools.cached_property
    def groups(self) -> Tensor:
        """``[num]`` the group of each sorted row."""
        return self._groups.to(self.device)

    @functools.cached_property
    def groups_as_they_lie(self) -> Tensor:
        """``[total]`` the group of each row in the input's order, -1 for none."""
        return self._codes.to(self.device)

    @functools.cached_property
    def padded(self) -> Tensor:
        """``[num_groups * widest]`` the rows of each group, filled up with a row of its own."""
        steps, starts = torch.arange(self.widest), torch.tensor(self.counts).cumsum(0) - torch.tensor(self.counts)
        inside = torch.minimum(steps, torch.tensor(self.counts)[:, None] - 1)
        return self._places[(starts[:, None] + inside).flatten()].to(self.device)

    @functools.cached_property
    def filling(self) -> Tensor | None:
        """``[num_groups, widest, 1]`` whether a place of ``padded`` only fills up; None where none does."""
        if min(self.counts) == self.widest:
            return None
        fills = torch.arange(self.widest) >= torch.tensor(self.counts)[:, None]
        return fills[:, :, None].to(self.device)

    @functools.cached_property
    def unpadded(self) -> Tensor:
        """``[num]`` where each sorted row stands in ``padded``."""
        within = torch.cat([torch.arange(count) for count in self.counts])
        return (self._groups * self.widest + within).to(self.device)

    def take(self, values: Tensor) -> Tensor:
        """Return the sorted rows of ``values``; a view where they lie sorted."""
        if self.start is not None:
            return values.narrow(0, self.start, self.num)
        return values.index_select(0, self.order)

    def add(self, values: Tensor, rows: Tensor) -> None:
        """Add sorted rows to ``values`` in place; rows of no group keep their bits."""
        if self.start is not None:
            values.narrow(0, self.start, self.num).add_(rows)
        else:
            values.index_add_(0, self.order, rows)

    def spread(self, rows: Tensor) -> Tensor:
        """Return ``[total, ...]`` with the sorted rows in their places and zeros elsewhere."""
        if self.start is not None and self.covers:
            return rows
        shape = (self.total, *rows.shape[1:])
        values = rows.new_empty(shape) if self.covers else rows.new_zeros(shape)
        return values.index_copy_(0, self.order, rows)
