"""Which singular components of an adapter are kept: by their energy, by a budget of numbers, or by a rank.

A component ``sigma u v^T`` of a layer has the energy ``sigma^2`` and costs ``d_out + d_in`` numbers. What leaving
components out costs is the sum of their energies, the squared Frobenius error over all layers together (Eckart & Young
1936), so that components of different layers can be weighed against each other. Taking those of most energy per number
first is the best choice wherever the budget ends with a component (Dantzig 1957, the fractional knapsack).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from lorakit.errors import ConfigError
from lorakit.settings import Settings


@dataclass(frozen=True)
class Components:
    """What can be kept of one layer.

    Attributes:
        energies: ``sigma^2`` of the components that are more than rounding, largest first; of a stack of matrices their
            sum over the stack, which keeps one rank for all.
        cost: numbers that one component takes.
        least: how many must stay.
    """

    energies: tuple[float, ...]
    cost: int
    least: int = 0


class Selection(Settings):
    """How much of an adapter is kept."""

    @abstractmethod
    def ranks(self, layers: Sequence[Components]) -> list[int]:
        """Return how many components of each layer stay, the first ones of each."""


class KeepEnergy(Selection):
    """The fewest numbers, up to one component, that hold this share of the whole adapter's energy.

    Attributes:
        share: of ``sum sigma^2`` over all layers, in (0, 1]; 1 keeps all that is more than rounding.
    """

    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

    def ranks(self, layers: Sequence[Components]) -> list[int]:
        """Take components by energy per number until the share is reached."""
        ranks = [layer.least for layer in layers]
        total = math.fsum(energy for layer in layers for energy in layer.energies)
        kept = math.fsum(energy for layer in layers for energy in layer.energies[: layer.least])
        for index in _by_gain(layers):
            if self.share < 1.0 and kept >= self.share * total:
                break
            kept += layers[index].energies[ranks[index]]
            ranks[index] += 1
        return ranks


class KeepNumbers(Selection):
    """As much energy as so many numbers hold.

    Attributes:
        budget: how many numbers the pairs may have together.
    """

    budget: Annotated[int, Field(ge=1, strict=True)]

    def ranks(self, layers: Sequence[Components]) -> list[int]:
        """Take components by energy per number, and those that no longer fit not.

        Raises:
            ConfigError: the budget is below what must stay, or below one component.
        """
        ranks = [layer.least for layer in layers]
        left = self.budget - sum(layer.least * layer.cost for layer in layers)
        if left < 0:
            raise ConfigError(
                f"a budget of {self.budget:,} numbers is below the {self.budget - left:,} that must stay: a rank of 1 "
                "wherever a layer has a trained bias or magnitude beside its pair."
            )
        for index in _by_gain(layers):
            if layers[index].cost <= left:
                ranks[index] += 1
                left -= layers[index].cost
        if not any(ranks):
            smallest = min(layer.cost for layer in layers if layer.energies)
            raise ConfigError(
                f"a budget of {self.budget:,} numbers is below one component: the smallest takes {smallest:,}."
            )
        return ranks


class KeepRank(Selection):
    """The same rank for every layer.

    Attributes:
        rank: at most so many components of each.
    """

    rank: Annotated[int, Field(ge=1, strict=True)]

    def ranks(self, layers: Sequence[Components]) -> list[int]:
        """Take the first ``rank`` of each layer."""
        return [max(layer.least, min(self.rank, len(layer.energies))) for layer in layers]


def _by_gain(layers: Sequence[Components]) -> Iterator[int]:
    """Yield the layer of each component that may be left out, those of most energy per number first."""
    gains = [
        (energy / layer.cost, index) for index, layer in enumerate(layers) for energy in layer.energies[layer.least :]
    ]
    return (index for _, index in sorted(gains, key=lambda gain: -gain[0]))
