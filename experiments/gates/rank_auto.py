"""Ranks from examples: one budget, spent evenly or where the layers need it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from experiments.gate import Found, Gate
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.inits import Calibration
from lorakit.layers import Site
from lorakit.methods.lora import LoRA
from lorakit.methods.ranks import cost_of_a_rank

SHAPES = ((64, 48), (40, 80), (72, 56), (50, 36))
EVEN, ALPHA = 4, 10.0
STEPS = 60
RATES = [2.0**k for k in range(-8, -3)]


class Beside(nn.Module):
    """Layers of unlike shapes beside each other, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_in, d_out, bias=False) for d_out, d_in in SHAPES])

    def forward(self, x: Tensor) -> Tensor:
        """Return all layers' outputs beside each other."""
        parts = x.split([d_in for _, d_in in SHAPES], dim=-1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], dim=-1)


class Stacked(nn.Module):
    """A deep network of unlike widths."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 64, 48, 64, 16)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for layer in self.layers[:-1]:
            x = torch.tanh(2 * layer(x))
        return self.layers[-1](x)


def planted(model: Beside, ranks: Sequence[int]) -> Beside:
    """Return a copy whose layers' weights are changed by matrices of these ranks, all singular values 1."""
    goal = Beside()
    goal.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, (d_out, d_in), rank in zip(goal.layers, SHAPES, ranks, strict=True):
            U, V = torch.linalg.qr(torch.randn(d_out, rank)).Q, torch.linalg.qr(torch.randn(d_in, rank)).Q
            layer.weight.add_(U @ V.T)
    return goal


def tuned(model: nn.Module, method: LoRA, x: Tensor, goal: Tensor) -> tuple[float, dict[str, float]]:
    """Return the share of the loss that is left at the best of several rates, and the ranks."""

    def loss(model: nn.Module, x: Tensor, goal: Tensor) -> Tensor:
        return (model(x) - goal).square().mean()

    calibration = Calibration(
        [{"x": a, "goal": b} for a, b in zip(x.split(64), goal.split(64), strict=True)],
        loss=lambda model, batch: loss(model, batch["x"], batch["goal"]),
        counted=lambda batch: None,
    )
    with torch.no_grad():
        before = float(loss(model, x, goal))
    targets = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    best = math.inf
    for lr in RATES:
        handle = attach(model, method, targets, seed=0, calibration=calibration)
        ranks = {path: float(update.A.shape[0]) for path, update in handle.updates().items()}
        optimizer = torch.optim.AdamW(handle.parameters().values(), lr, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model, x, goal).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            best = min(best, float(loss(model, x, goal)) / before)
        handle.detach()
    return best, ranks


def compared(model: nn.Module, x: Tensor, goal: Tensor) -> Found:
    """Compare ranks by gradient with even ones, at the same number of numbers."""
    sites = [Site.at(model, name) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    budget = EVEN * sum(cost_of_a_rank(site) for site in sites)
    even, _ = tuned(model, LoRA(rank=EVEN, alpha=ALPHA), x, goal)
    auto, ranks = tuned(model, LoRA(rank="auto", budget=budget, alpha=ALPHA), x, goal)
    return Found(auto / even, {"left with chosen ranks": auto, "with even ranks": even, **ranks})


def beside(seed: int, ranks: Sequence[int]) -> Found:
    torch.manual_seed(seed)
    model = Beside()
    x = torch.randn(512, sum(d_in for _, d_in in SHAPES))
    goal = planted(model, ranks)(x).detach()
    return compared(model, x, goal)


def deep(seed: int) -> Found:
    torch.manual_seed(seed)
    model, other = Stacked(), Stacked()
    x = torch.randn(512, 24)
    with torch.no_grad():
        goal = 0.7 * model(x) + 0.3 * other(x)
    return compared(model, x, goal)


GATES: list[Gate] = [
    Gate(
        "rank auto",
        "Where layers need ranks 10, 3, 2 and 1, chosen ranks leave less of the loss than rank 4 everywhere.",
        "<= 0.5 of what even ranks leave",
        functools.partial(beside, ranks=(10, 3, 2, 1)),
        lambda value: value <= 0.5,
        source="derived",
    ),
    Gate(
        "rank auto",
        "Where all layers need the same rank 6, chosen ranks leave, of what even ranks leave:",
        "reported",
        functools.partial(beside, ranks=(6, 6, 6, 6)),
        None,
        source="derived",
    ),
    Gate(
        "rank auto",
        "In a deep network that is to become another one, chosen ranks leave, of what even ranks leave:",
        "reported",
        deep,
        None,
        source="derived",
    ),
]
