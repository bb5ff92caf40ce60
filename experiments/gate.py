"""``Gate``: one claim about a method, its criterion, and the small experiment that decides it.

A file in ``experiments/gates/`` holds the claims of one method as ``GATES``; ``python experiments/run_gates.py`` runs
them all. An experiment measures; the criterion is the gate's, so that a figure that misses it is shown, not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        value: the figure that the criterion is about.
        beside: other figures worth showing, by name (plain LoRA's, a bound, a control).
    """

    value: float
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """One claim.

    Attributes:
        method: the method or init by its name.
        claim: what is claimed, a sentence a reader understands.
        criterion: the bound in words, such as '<= 0.1'; 'reported' where nothing is promised.
        measure: the experiment; takes a seed.
        passes: whether a value meets the criterion; None where it is only reported.
        seeds: how many seeds are run.
        needed: how many of them must pass.
        source: where the claim comes from (paper, section), or 'derived'.
    """

    method: str
    claim: str
    criterion: str
    measure: Callable[[int], Found]
    passes: Callable[[float], bool] | None
    seeds: int = 3
    needed: int = 3
    source: str = ""
