"""DyLoRA: one training, cut to any lower rank, does nearly what a training at that rank does."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from experiments.gate import Found, Gate
from experiments.planted_ranks import planted, train
from torch import nn

from lorakit.adapters import AdapterState, Handle
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods import Method
from lorakit.methods.dylora import DyLoRA, DyLoRAUpdate, truncated
from lorakit.methods.lora import LoRA

SIZE, RANK, ALPHA = (24, 36), 8, 12.0
STEPS, RATE = 400, 2e-2
SPECTRUM = torch.arange(1, 13).float().reciprocal().sqrt()


class FactorOfRank(DyLoRAUpdate):
    """The ablation: the factor is ``alpha / b`` where ``b`` components act."""

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the pair with this factor."""
        count = float(self.acting.sum()) if self.training else float(len(self.acting))
        return replace(super().terms(ops, layer), scale=self.scale * len(self.acting) / count)


class DyLoRAFactorOfRank(DyLoRA):
    """DyLoRA with the factor ``alpha / b``."""

    name: ClassVar[str] = "dylora-factor-of-rank"

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> FactorOfRank:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype, seen)
        return FactorOfRank(A, B, self.scale_at(site.path), self.dropout, bias)


def cut_to(state: AdapterState, rank: int, method: Method) -> AdapterState:
    """Return a saved adapter cut to a rank, with the factor that its method means there."""
    cut = truncated(state, rank)
    if not isinstance(method, DyLoRAFactorOfRank):
        return cut
    sites = {}
    for path, site in cut.sites.items():
        B = site.tensors["B"] * (RANK / rank)
        sites[path] = replace(site, tensors={"A": site.tensors["A"], "B": B})
    return replace(cut, sites=sites)


def losses_of(method: Method, seed: int, ranks: range) -> list[float]:
    """Return the losses of one training, cut to each of these ranks."""
    model, teacher = planted([SIZE], [SPECTRUM], seed, batch=None)
    state = train(model, teacher, method, STEPS, RATE, seed).handle.state()
    found = []
    for rank in ranks:
        bare, _ = planted([SIZE], [SPECTRUM], seed, batch=None)
        Handle(bare).add_state(cut_to(state, rank, method))
        with torch.no_grad():
            found.append(float(teacher.loss(bare.eval())))
    return found


@functools.cache
def measured(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Return the losses at every rank of DyLoRA cut, of LoRA trained at that rank alone, and of a full LoRA cut."""
    every = range(1, RANK + 1)
    nested = losses_of(DyLoRA(rank=RANK, alpha=ALPHA), seed, every)
    scale = ALPHA / RANK  # the same factor at every rank, so that one learning rate suits all
    alone = [losses_of(LoRA(rank=rank, alpha=scale * rank), seed, range(rank, rank + 1))[0] for rank in every]
    cut = losses_of(LoRA(rank=RANK, alpha=ALPHA), seed, every)
    return nested, alone, cut


def margin(seed: int) -> Found:
    """Measure the largest ratio of the loss to that of a LoRA of the rank, over all ranks."""
    nested, alone, _ = measured(seed)
    ratios = [a / b for a, b in zip(nested, alone, strict=True)]
    return Found(max(ratios), {f"rank {rank}": ratios[rank - 1] for rank in (1, 2, 4, 8)})


def against_cutting(seed: int) -> Found:
    """Measure the largest ratio of the loss to that of plain LoRA cut to the rank, over all lower ranks."""
    nested, _, cut = measured(seed)
    ratios = [a / b for a, b in zip(nested[:-1], cut[:-1], strict=True)]
    return Found(max(ratios), {f"rank {rank}": ratios[rank - 1] for rank in (1, 2, 4)})


def factor_of_rank(seed: int) -> Found:
    """Measure the margin where the factor changes with what acts."""
    _, alone, _ = measured(seed)
    other = losses_of(DyLoRAFactorOfRank(rank=RANK, alpha=ALPHA), seed, range(1, RANK + 1))
    ratios = [a / b for a, b in zip(other, alone, strict=True)]
    return Found(max(ratios), {f"rank {rank}": ratios[rank - 1] for rank in (1, 2, 4, 8)})


GATES = [
    Gate(
        "dylora",
        "One training of rank 8, cut to any rank from 1 to 8, loses at most 5 % to a LoRA trained at that rank alone.",
        "<= 1.05",
        margin,
        lambda value: value <= 1.05,
        source="arXiv 2210.07558, section 4; setup derived",
    ),
    Gate(
        "dylora",
        "Cut to any lower rank it is better than a plain LoRA of rank 8 that is cut the same way.",
        "< 1",
        against_cutting,
        lambda value: value < 1.0,
        source="arXiv 2210.07558, section 4; setup derived",
    ),
    Gate(
        "dylora",
        "The margin that a factor of alpha / b would have in place of the constant one.",
        "reported",
        factor_of_rank,
        None,
        needed=0,
        source="derived",
    ),
]
