"""AdaLoRA: it finds planted ranks, and spends a budget better than the same rank for every layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from experiments.gate import Found, Gate
from experiments.planted_ranks import SIZES, distance, planted, train, unit_spectra
from torch import Tensor

from lorakit.methods import Rule, Update
from lorakit.methods.adalora import AdaLoRA, AdaLoRARule
from lorakit.methods.lora import LoRA

RANKS = (0, 1, 2, 4, 6, 3)
STEPS, RATE = 500, 2e-2
METHOD = AdaLoRA(rank=3, total=sum(RANKS), init_rank=8, alpha=6.0, tfinal=0.33)


class MagnitudeRule(AdaLoRARule):
    """Keeps the components with the largest ``|E|``: the ablation."""

    def scores(self) -> dict[str, Tensor]:
        """Return ``|E|``."""
        blocks = {path: next(update.counting()) for path, update in self.layers.items()}
        return {path: block.E.detach().abs() for path, block in blocks.items() if block.E is not None}


class ByMagnitude(AdaLoRA):
    """AdaLoRA that weighs components by size alone."""

    name: ClassVar[str] = "adalora-by-magnitude"

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return the ablated rule."""
        return MagnitudeRule(updates, num_steps, self)


@functools.cache
def found(method: AdaLoRA, seed: int) -> tuple[tuple[int, ...], float]:
    """Return the ranks that a method finds, and its loss in the end."""
    trained = train(*planted(SIZES, unit_spectra(RANKS), seed), method, STEPS, RATE, seed)
    return tuple(trained.ranks), trained.loss


@functools.cache
def uniform(seed: int) -> float:
    """Return the loss of LoRA with as many components, 2 or 3 in each layer: 2 where least is planted."""
    method = LoRA(rank=3, alpha=6.0, rank_pattern={"layers.[01]": 2}, alpha_pattern={"layers.[01]": 4.0})
    return train(*planted(SIZES, unit_spectra(RANKS), seed), method, STEPS, RATE, seed).loss


def ranks_found(seed: int) -> Found:
    """Measure how far the ranks are from the planted ones."""
    ranks, loss = found(METHOD, seed)
    return Found(distance(ranks, RANKS), {"loss": loss})


def loss_ratio(seed: int) -> Found:
    """Measure the loss as a share of uniform LoRA's."""
    _, loss = found(METHOD, seed)
    return Found(loss / uniform(seed), {"AdaLoRA": loss, "LoRA": uniform(seed)})


def loosely(seed: int) -> Found:
    """Measure the ablation where components are kept apart a fifth as strongly: there size and use differ most."""
    loose = {**METHOD.model_dump(), "orthogonality": 0.1}
    by_size, by_use = found(ByMagnitude(**loose), seed)[0], found(AdaLoRA(**loose), seed)[0]
    return Found(distance(by_size, RANKS), {"by sensitivity": distance(by_use, RANKS)})


SOURCE = "arXiv 2303.10512, section 3.2; setup derived"
GATES = [
    Gate(
        "adalora",
        "Of six regressions with updates of rank 0, 1, 2, 4, 6 and 3, a budget of 16 components finds these ranks.",
        "distance = 0",
        ranks_found,
        lambda value: value == 0.0,
        seeds=5,
        needed=4,
        source=SOURCE,
    ),
    Gate(
        "adalora",
        "There its loss is less than half of that of LoRA with as many components, alike in all layers.",
        "< 0.5",
        loss_ratio,
        lambda value: value < 0.5,
        seeds=5,
        needed=4,
        source=SOURCE,
    ),
    Gate(
        "adalora",
        "Distance of the ranks that are found by the size of components alone, at orthogonality 0.1 (beside it: by the "
        "method's own scores there).",
        "reported",
        loosely,
        None,
        seeds=3,
        needed=0,
        source="derived",
    ),
]
