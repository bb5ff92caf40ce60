"""Ranks chosen from examples: a budget of numbers, spent where the layers need it.

A rank of a layer costs ``d_out + d_in`` numbers. What its i-th component is worth is either the square of the i-th
singular value of the loss's gradient there (what a step of gradient descent would win with it, to first order), or the
share of the variance of the layer's inputs that the i-th principal component explains, as EVA weighs them (Paischer et
al. 2024, arXiv 2410.07170). The components of all layers are bought in the order of worth per number, each where it
still fits, until none does: what is left of the budget is less than any layer's next component costs.

Every layer gets the same factor on ``B A``: what alpha means at the even rank, the budget over the cost of one rank in
every layer. The share of a component does not depend on how many others its layer got.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.inits import Calibration
from lorakit.inits.gradients import gradient_directions
from lorakit.inits.inputs import components_of_inputs
from lorakit.layers import Site
from lorakit.methods.patterns import at_sites, matching_value, whole

if TYPE_CHECKING:
    from lorakit.methods.lora import LoRA

MOST_TIMES_EVEN = 8
"""No layer gets more than so many times the even rank: what is looked at grows with it."""

GRADIENT_ROWS, INPUT_ROWS = 32, 512
TAU = 0.99


def with_chosen_ranks(
    method: LoRA, model: nn.Module, sites: Sequence[Site], calibration: Calibration, generator: torch.Generator
) -> LoRA:
    """Return the method with a rank for every site, 0 for those to be left as they are.

    Raises:
        ConfigError: the budget is below the cheapest component, or above all there are.
        DataError: the examples do not suffice.
        UnsupportedLayerError: a site whose gradient or inputs cannot be looked at.
    """
    assert method.budget is not None
    costs = {site.path: cost_of_a_rank(site) for site in sites}
    even = even_rank(method.budget, sites)
    limit = math.ceil(MOST_TIMES_EVEN * even)
    most = {site.path: min(site.d_out, site.d_in, limit, method.budget // costs[site.path]) for site in sites}
    _check_budget(method.budget, sites, costs)
    worth = worths(method, model, sites, most, calibration, generator)
    ranks = bought(worth, costs, most, method.budget)
    return _with_ranks(method, ranks, even)


def with_even_ranks(method: LoRA, sites: Sequence[Site]) -> LoRA:
    """Return the method with ranks that spend the budget as evenly as can be: a stand-in for those to be chosen."""
    assert method.budget is not None
    costs = {site.path: cost_of_a_rank(site) for site in sites}
    most = {site.path: min(site.d_out, site.d_in) for site in sites}
    worth = {path: [costs[path] / (i + 1) for i in range(most[path])] for path in costs}  # all first ranks, then second
    return _with_ranks(method, bought(worth, costs, most, method.budget), even_rank(method.budget, sites))


def cost_of_a_rank(site: Site) -> int:
    """Return how many numbers one rank of a site's pair (or pairs, of a stack) has."""
    return math.prod(site.stack) * (site.d_out + site.d_in)


def even_rank(budget: int, sites: Sequence[Site]) -> float:
    """Return the rank that every site could have for this many numbers, not rounded; at least 1."""
    return max(1.0, budget / max(1, sum(cost_of_a_rank(site) for site in sites)))


def _check_budget(budget: int, sites: Sequence[Site], costs: Mapping[str, int]) -> None:
    cheapest = min(costs, key=lambda path: costs[path])
    if budget < costs[cheapest]:
        raise ConfigError(
            f"budget {budget:,} is below the {costs[cheapest]:,} numbers of one rank at '{cheapest}', the cheapest of "
            "the targets. Raise it."
        )
    most = sum(costs[site.path] * min(site.d_out, site.d_in) for site in sites)
    if budget > most:
        raise ConfigError(
            f"budget {budget:,} is above the {most:,} numbers that the targets can take at their full ranks. Lower it."
        )


def worths(
    method: LoRA,
    model: nn.Module,
    sites: Sequence[Site],
    most: Mapping[str, int],
    calibration: Calibration,
    generator: torch.Generator,
) -> dict[str, list[float]]:
    """Return what each component of each site is worth, largest first, by path."""
    looked_at = [site for site in sites if most[site.path] > 0]
    if method.rank_by == "inputs":
        seen = components_of_inputs(model, looked_at, most, calibration.first(INPUT_ROWS), TAU)
        return {path: found.ratios().tolist() for path, found in seen.items()}
    found = gradient_directions(model, looked_at, most, calibration.first(GRADIENT_ROWS), generator)
    squares = {path: directions.values.double().square() for path, directions in found.items()}
    return {path: (each if each.dim() == 1 else each.sum(dim=0)).tolist() for path, each in squares.items()}


def bought(
    worth: Mapping[str, Sequence[float]], costs: Mapping[str, int], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return how many components of each site the budget buys, best worth per number first.

    >>> bought({"a": [9.0, 4.0], "b": [5.0, 0.1]}, {"a": 10, "b": 10}, {"a": 2, "b": 2}, 35)
    {'a': 2, 'b': 1}

    Args:
        worth: of each component by path, falling.
        costs: of one component by path.
        most: how many at most by path.
        budget: numbers that may be spent.
    """
    offers = [
        (-value / costs[path], i, path)
        for path, values in worth.items()
        for i, value in enumerate(values[: most[path]])
    ]
    ranks = dict.fromkeys(costs, 0)
    for _, _, path in sorted(offers):
        if costs[path] <= budget:
            budget -= costs[path]
            ranks[path] += 1
    return ranks


def _with_ranks(method: LoRA, ranks: Mapping[str, int], even: float) -> LoRA:
    """Return the method with these ranks, and the factor of the even rank at every site."""
    wanted = {
        path: (rank, float(matching_value(method.alpha_pattern, path, method.alpha)) / _root(method, even))
        for path, rank in ranks.items()
        if rank > 0
    }
    plain: LoRA = method.replaced(rank=max(1, round(even)), budget=None, rank_by="gradient", alpha_pattern={})
    if len(wanted) == len(ranks):
        return at_sites(plain, wanted)
    # A key without an anchor may mean several paths, and the first that matches counts: whole paths are safe.
    exact = {path: f"^{re.escape(path)}" for path in ranks}
    alphas = {exact[path]: whole(scale * _root(method, rank)) for path, (rank, scale) in wanted.items()}
    chosen: LoRA = plain.replaced(rank_pattern={exact[p]: rank for p, rank in ranks.items()}, alpha_pattern=alphas)
    return chosen


def _root(method: LoRA, rank: float) -> float:
    """Return what alpha is divided by at a rank."""
    return math.sqrt(rank) if method.scaling == "rslora" else rank
