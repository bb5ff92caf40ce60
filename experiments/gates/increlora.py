"""IncreLoRA: it grows where most is missing, exactly to its budget, and growing changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from experiments.gate import Found, Gate
from experiments.planted_ranks import SIZES, Trained, distance, planted, spearman, train, unit_spectra
from torch import Tensor, nn

from lorakit.methods.increlora import IncreLoRA, IncreLoRARule
from lorakit.training.stepper import Stepper

RANKS = (1, 1, 2, 4, 6, 3)
STEPS, RATE = 500, 2e-2
METHOD = IncreLoRA(rank=3, total=sum(RANKS), alpha=6.0)


@torch.no_grad()
def both_modes(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs as used and as trained, all layers' in one tensor each."""
    found = []
    for training in (False, True):
        model.train(training)
        found.append(torch.cat([out.flatten() for out in model(inputs)]))
    return found


@functools.cache
def run(seed: int) -> tuple[Trained, tuple[float, ...], int]:
    """Return the training, by which share the outputs changed at each growth, and the most components at any time."""
    model, teacher = planted(SIZES, unit_spectra(RANKS), seed)
    changes: list[float] = []
    most = 0

    def watch(stepper: Stepper) -> None:
        rule = stepper.rule
        assert isinstance(rule, IncreLoRARule)
        after_step: Callable[[int], None] = rule.after_step

        def watched(step: int) -> None:
            nonlocal most
            count, before = rule.count(), both_modes(model, list(teacher.inputs))
            after_step(step)
            most = max(most, rule.count())
            if rule.count() > count:
                after = both_modes(model, list(teacher.inputs))
                changes.extend(float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True))

        rule.after_step = watched  # type: ignore[method-assign]

    trained = train(model, teacher, METHOD, STEPS, RATE, seed, watch)
    return trained, tuple(changes), most


def order(seed: int) -> Found:
    """Measure the rank correlation of planted and found ranks."""
    trained, _, _ = run(seed)
    return Found(spearman(RANKS, trained.ranks), {"loss": trained.loss})


def ranks_found(seed: int) -> Found:
    """Measure how far the ranks are from the planted ones."""
    return Found(distance(run(seed)[0].ranks, RANKS))


def change_at_growth(seed: int) -> Found:
    """Measure the largest change of the outputs at any growth, in use or in training."""
    _, changes, _ = run(seed)
    return Found(max(changes), {"growths": len(changes) / 2})


def budget(seed: int) -> Found:
    """Measure by how many components the end misses the budget, or any moment exceeds it."""
    trained, _, most = run(seed)
    return Found(float(abs(sum(trained.ranks) - sum(RANKS)) + max(0, most - sum(RANKS))), {"most": float(most)})


SOURCE = "arXiv 2308.12043, section 3; setup derived"
GATES = [
    Gate(
        "increlora",
        "Of six regressions with updates of rank 1, 1, 2, 4, 6 and 3, growth from 1 each to 17 finds the ranks' order.",
        "Spearman >= 0.9",
        order,
        lambda value: value >= 0.9,
        seeds=5,
        needed=4,
        source=SOURCE,
    ),
    Gate(
        "increlora",
        "There at most one component is misplaced.",
        "distance <= 2",
        ranks_found,
        lambda value: value <= 2.0,
        seeds=5,
        needed=4,
        source=SOURCE,
    ),
    Gate(
        "increlora",
        "No growth changes what the model computes: ||after - before|| / ||before||, in use and in training.",
        "<= 1e-5",
        change_at_growth,
        lambda value: value <= 1e-5,
        seeds=5,
        needed=5,
        source="derived",
    ),
    Gate(
        "increlora",
        "The budget is met exactly in the end, and never exceeded.",
        "= 0",
        budget,
        lambda value: value == 0.0,
        seeds=5,
        needed=5,
        source="derived",
    ),
]
