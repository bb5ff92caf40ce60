"""``Routing``: which adapter each row, or each position, of a batch belongs to.

One name per row is the special case of one name per position; it is expanded by the shape of each
layer's input. Where a layer sees another number of positions than the batch has (a pooler, a head
that keeps the last token), a row whose positions all agree keeps its adapter; anything else is
refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.errors import RoutingError

Route = Sequence[str | None] | Sequence[Sequence[str | None]]


class Routing:
    """An assignment of adapters to the rows or positions of one batch.

    Attributes:
        names: the adapters that occur, in order of appearance.
        index: ``[rows]`` or ``[rows, positions]``, the place in ``names``, or -1 for the base alone.
    """

    def __init__(self, route: Route) -> None:
        """Read a list of names (None: base alone), one per row, or a list of such lists, one per position."""
        if isinstance(route, str):
            raise RoutingError(
                f"a route names one adapter (or None) per row: write ['{route}'] * rows, or use('{route}')."
            )
        rows = [list(row) if isinstance(row, (list, tuple)) else row for row in route]
        flat = [name for row in rows for name in (row if isinstance(row, list) else [row])]
        if not flat:
            raise RoutingError("an empty route: name one adapter (or None) per row of the batch.")
        if len({len(row) if isinstance(row, list) else -1 for row in rows}) > 1:
            raise RoutingError("a route has rows of different lengths; every row needs one entry per position.")
        self.names: tuple[str, ...] = tuple(dict.fromkeys(str(name) for name in flat if name is not None))
        place = {name: i for i, name in enumerate(self.names)}
        codes = [-1 if name is None else place[str(name)] for name in flat]
        by_position = isinstance(rows[0], list)
        self.index = torch.tensor(codes).view(len(rows), -1) if by_position else torch.tensor(codes)
        self._cache: dict[tuple[object, ...], Tensor] = {}

    def rows(self) -> Tensor | None:
        """Return one code per row, ``[rows]``, or None where a row holds several adapters."""
        if self.index.dim() == 1:
            return self.index
        first = self.index[:, 0]
        return first if bool((self.index == first[:, None]).all()) else None

    def places(self, name: str, leading: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
        """Find where one adapter acts in a layer's input.

        Args:
            name: an adapter.
            leading: the input's leading shape, whose entries each become one output.
            device: where the indices are needed.

        Returns:
            Indices, and the number of leading dimensions they run over once flattened: 1 for whole rows
            (indices into the first dimension), else ``len(leading)``.

        Raises:
            RoutingError: the input's positions cannot be told.
        """
        codes, depth = self._codes(leading)
        key = (name, depth, len(codes), device)
        if key not in self._cache:
            code = self.names.index(name) if name in self.names else -2
            self._cache[key] = (codes == code).nonzero().flatten().to(device)
        return self._cache[key], depth

    def _codes(self, leading: tuple[int, ...]) -> tuple[Tensor, int]:
        rows = self.rows()
        if rows is not None and leading and leading[0] == len(rows):
            return rows, 1
        by_position = self.index.dim() == 2 and math.prod(leading) == self.index.numel()
        if by_position and leading[0] in (len(self.index), self.index.numel()):
            return self.index.flatten(), len(leading)
        asked = " x ".join(str(size) for size in self.index.shape)
        found = " x ".join(str(size) for size in leading) or "no batch dimension"
        unit = "rows" if self.index.dim() == 1 else "rows x positions"
        raise RoutingError(
            f"a route for {asked} {unit} meets a layer whose input has {found} positions: "
            "whose they are cannot be told. Give one adapter per position of the batch, or one per row with "
            "inputs that keep the batch first."
        )
