"""Ranges of a model's numbered blocks: ``0-5``, ``3``, ``0-2,7``, ``last:4``, or a list of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from lorakit.errors import TargetError

Layers = str | int | range | Sequence[int]


def layer_filter(layers: Layers | None, modules: Iterable[str]) -> Callable[[str], bool]:
    """Return which paths lie in the chosen blocks.

    Raises:
        TargetError: the model has no numbered blocks, or not these.
    """
    if layers is None:
        return lambda path: True
    present = sorted({number for p in modules if (number := block_number(p)) is not None})
    if not present:
        raise TargetError(f"layers {layers!r}: this model's paths have no block numbers.")
    wanted = _parse_layers(layers, present)
    missing = sorted(wanted - set(present))
    if missing or not wanted:
        raise TargetError(
            f"layers {layers!r}: no block {missing or 'at all'}; this model has {present[0]} to {present[-1]}."
        )
    return lambda path: block_number(path) in wanted


def _parse_layers(layers: Layers, present: Sequence[int]) -> set[int]:
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, str):
        return {number if number >= 0 else present[-1] + 1 + number for number in layers}
    wanted: set[int] = set()
    for part in layers.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        last = re.fullmatch(r"last:(\d+)", part)
        if span and int(span[1]) <= int(span[2] or span[1]):
            wanted |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
        elif last and 0 < int(last[1]) <= len(present):
            wanted |= set(present[-int(last[1]) :])
        elif span or last:
            raise TargetError(
                f"layers '{layers}': '{part}' means no such blocks; this model has {present[0]} to {present[-1]}."
            )
        else:
            raise TargetError(f"layers '{layers}': '{part}' is not understood. Write '0-5', '3', '0-2,7' or 'last:4'.")
    return wanted


def block_number(path: str) -> int | None:
    """Return the number of the block a path lies in: its first component that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
