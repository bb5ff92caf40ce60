"""``Routing``: which adapter each row, or each position, of a batch belongs to.

One name per row is the special case of one name per position; it is expanded by the shape of each
layer's input. Where a layer sees another number of positions than the batch has (a pooler, a head
that keeps the last token), a row whose positions all agree keeps its adapter; anything else is
refused, never guessed. Rows are sorted by adapter once, for all layers whose inputs are shaped alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import RoutingError
from lorakit.kernels.segments import Segments

Route = Sequence[str | None] | Sequence[Sequence[str | None]]


class Places(NamedTuple):
    """Where some adapters act in a layer's input.

    Attributes:
        order: indices into the input's first ``depth`` dimensions, flattened: one adapter's after the other's.
        counts: how many are each adapter's.
        depth: 1 for whole rows, else as many dimensions as the leading shape has.
    """

    order: Tensor
    counts: tuple[int, ...]
    depth: int


class Routing:
    """An assignment of adapters to the rows or positions of one batch.

    Attributes:
        names: the adapters that occur, in order of appearance.
        shape: ``(rows,)`` or ``(rows, positions)``.
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
        self._codes = [-1 if name is None else place[str(name)] for name in flat]
        by_position = isinstance(rows[0], list)
        self.shape: tuple[int, ...] = (len(rows), len(flat) // len(rows)) if by_position else (len(rows),)
        self._rows = self._codes if not by_position else self._agreeing()
        self._places: dict[tuple[object, ...], Places] = {}
        self._segments: dict[tuple[object, ...], Segments] = {}

    def places(self, names: Sequence[str], leading: tuple[int, ...], device: torch.device) -> Places:
        """Find where adapters act in a layer's input.

        Args:
            names: adapters; each occurs.
            leading: the input's leading shape, whose entries each become one output.
            device: where the indices are needed.

        Raises:
            RoutingError: the input's positions cannot be told.
        """
        key = (tuple(names), leading, device)
        if key not in self._places:
            codes, depth = self._codes_of(leading)
            found: dict[int, list[int]] = {self.names.index(name): [] for name in names}
            for position, code in enumerate(codes):
                if code in found:
                    found[code].append(position)
            with _outside_inference_mode():
                order = torch.tensor([position for own in found.values() for position in own], device=device)
            self._places[key] = Places(order, tuple(len(own) for own in found.values()), depth)
        return self._places[key]

    def segments(self, names: tuple[str, ...], leading: tuple[int, ...], device: torch.device) -> Segments:
        """Sort all entries of a leading shape by adapter: groups in the order of ``names``, each of which occurs.

        Raises:
            RoutingError: the input's positions cannot be told.
        """
        key = (names, leading, device)
        if key not in self._segments:
            codes, depth = self._codes_of(leading)
            groups = torch.full((len(self.names) + 1,), -1)  # the last one is the base's, whose code is -1
            for group, name in enumerate(names):
                groups[self.names.index(name)] = group
            own = groups[torch.tensor(codes)].repeat_interleave(math.prod(leading[depth:]))
            self._segments[key] = Segments(own, len(names), device)
        return self._segments[key]

    def _agreeing(self) -> list[int] | None:
        """Return one code per row, or None where a row holds several adapters."""
        width = self.shape[1]
        rows = [self._codes[start : start + width] for start in range(0, len(self._codes), width)]
        return [row[0] for row in rows] if all(len(set(row)) == 1 for row in rows) else None

    def _codes_of(self, leading: tuple[int, ...]) -> tuple[list[int], int]:
        """Return the codes of a layer's input, and over how many of its dimensions they run."""
        rows = self._rows
        if rows is not None and leading and leading[0] == len(rows):
            return rows, 1
        by_position = len(self.shape) == 2 and math.prod(leading) == len(self._codes)
        if by_position and leading[0] in (self.shape[0], len(self._codes)):
            return self._codes, len(leading)
        asked = " x ".join(str(size) for size in self.shape)
        found = " x ".join(str(size) for size in leading) or "no batch dimension"
        unit = "rows" if len(self.shape) == 1 else "rows x positions"
        raise RoutingError(
            f"a route for {asked} {unit} meets a layer whose input has {found} positions: "
            "whose they are cannot be told. Give one adapter per position of the batch, or one per row with "
            "inputs that keep the batch first."
        )


def _outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Return a context in which tensors are made that a training forward may want as well.

    A graph of torch.compile knows neither the mode nor the question whether it is on.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)
