"""How the learning rate moves: up from almost nothing, then as the schedule says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WARMUP_SHARE = 0.06


def linear(left: float) -> float:
    """Fall in a straight line to 0."""
    return left


def cosine(left: float) -> float:
    """Fall to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))


def constant(left: float) -> float:
    """Stay at the peak."""
    return 1.0


SHAPES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}
"""Each takes the share of the steps after the warm-up that is left, from 1 down to 0."""


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate at each step.

    >>> [round(Schedule("linear", 5, warmup=1)(step), 2) for step in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]

    Attributes:
        name: 'linear', 'cosine' or 'constant'.
        num_steps: optimizer steps in all.
        warmup: a share of the steps below 1 (rounded up, at least one step), or a number of steps; 0 for none.
    """

    name: str
    num_steps: int
    warmup: float = WARMUP_SHARE

    @property
    def num_warmup(self) -> int:
        """Steps before the peak."""
        if self.warmup >= 1:
            return min(int(self.warmup), self.num_steps)
        return max(1, math.ceil(self.warmup * self.num_steps)) if self.warmup > 0 else 0

    def __call__(self, step: int) -> float:
        """Return the factor at ``step``, counted from 0."""
        warmup = self.num_warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return SHAPES[self.name](max(0.0, (self.num_steps - step) / max(1, self.num_steps - warmup)))
