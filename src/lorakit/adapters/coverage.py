"""How much of a base its adapters reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.adapters.targets import is_below
from lorakit.adapters.walk import walk_parameters
from lorakit.layers import Site


@dataclass(frozen=True)
class Coverage:
    """How many of the base's matrix parameters the targets are.

    Attributes:
        reached: numbers in the targets' weights.
        total: numbers in all parameters of two or more dimensions.
        unreached: the others by module path, largest first.
    """

    reached: int
    total: int
    unreached: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Say the share in a sentence."""
        share = 100.0 * self.reached / max(self.total, 1)
        text = f"{share:.1f} % of {self.total:,} matrix parameters"
        if self.unreached:
            rest = ", ".join(f"{path} ({count:,})" for path, count in self.unreached[:4])
            more = len(self.unreached) - 4
            text += f"; not: {rest}" + (f" and {more} more" if more > 0 else "")
        return text


def coverage(model: nn.Module, sites: Sequence[Site], full: Sequence[str] = ()) -> Coverage:
    """Count which matrix parameters of the base are reached by ``sites`` or trained in full."""
    numbers: dict[int, int] = {}
    tied: set[tuple[int, object]] = set()
    for site in sites:
        weight = id(site.ops.weight(site.layer))
        if (weight, site.runs) in tied:
            continue
        tied.add((weight, site.runs))
        numbers[weight] = numbers.get(weight, 0) + site.matrix().numel()
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied ones under each of their names
        if is_below(name.rpartition(".")[0], full):
            numbers[id(parameter)] = parameter.numel()
    reached = total = 0
    missed: dict[str, int] = {}
    for name, parameter in walk_parameters(model):
        if parameter.dim() < 2:
            continue
        total += parameter.numel()
        path, _, last = name.rpartition(".")
        hit = min(numbers.get(id(parameter), 0), parameter.numel())
        reached += hit
        if hit < parameter.numel():
            shown = path if last == "weight" else name
            missed[shown] = missed.get(shown, 0) + parameter.numel() - hit
    ordered = sorted(missed.items(), key=lambda item: (-item[1], item[0]))
    return Coverage(reached, total, tuple(ordered))
