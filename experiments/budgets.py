"""Ranks by which methods train as many numbers as LoRA of a given rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

WITHIN = 0.05
"""How far from the budget a method's numbers may be, as a share of it."""

PerLayer = Mapping[str, int]
"""Trained numbers by layer path."""


@dataclass(frozen=True)
class Matched:
    """A method's ranks for a budget.

    Attributes:
        rank: of every layer but those in ``higher``, which have one more.
        numbers: what it trains with them.
        within: whether that is as near to the budget as it must be.
    """

    rank: int
    numbers: int
    within: bool
    higher: tuple[str, ...] = ()


def match(numbers_at: Callable[[int], PerLayer], budget: int, most: int, mixes: bool) -> Matched:
    """Return the ranks whose numbers are nearest to the budget.

    Args:
        numbers_at: a method's numbers by layer at one rank; more at a higher rank.
        budget: numbers to come near to.
        most: the highest rank to try.
        mixes: whether layers may differ in rank, by one; then some do where one rank for all misses the budget.
    """
    low, high = 1, most
    while high - low > 1:  # the last rank that is not above the budget, between these
        middle = (low + high) // 2
        low, high = (middle, high) if sum(numbers_at(middle).values()) <= budget else (low, middle)
    totals = {rank: sum(numbers_at(rank).values()) for rank in {low, high}}
    rank = min(totals, key=lambda rank: (abs(totals[rank] - budget), rank))
    if _is_within(totals[rank], budget) or not mixes or totals[low] > budget or low == high:
        return Matched(rank, totals[rank], _is_within(totals[rank], budget))
    higher = raised(numbers_at(low), numbers_at(high), budget)
    numbers = sum((numbers_at(high) if path in higher else numbers_at(low))[path] for path in numbers_at(low))
    return Matched(low, numbers, _is_within(numbers, budget), higher)


def raised(low: PerLayer, high: PerLayer, budget: int) -> tuple[str, ...]:
    """Return the layers that take the higher rank, in their order, while each brings the sum nearer to the budget.

    >>> raised({"a": 10, "b": 10, "c": 10}, {"a": 14, "b": 14, "c": 14}, 38)
    ('a', 'b')
    """
    total, chosen = sum(low.values()), []
    for path in low:
        more = high[path] - low[path]
        if abs(total + more - budget) < abs(total - budget):
            total += more
            chosen.append(path)
    return tuple(chosen)


def _is_within(numbers: int, budget: int) -> bool:
    return abs(numbers - budget) <= WITHIN * budget
