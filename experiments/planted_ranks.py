"""Regressions whose weights change by planted updates of known rank, trained by the training loop's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach
from lorakit.methods import Method
from lorakit.training.plan import Plan
from lorakit.training.stepper import Stepper
from lorakit.training.tasks.shortcuts import NONE

SIZES = ((32, 24), (20, 36), (28, 32), (36, 20), (24, 30), (30, 26))
NOISE = 0.05
ROWS, BATCH = 512, 64


class Regressions(nn.Module):
    """Independent linear layers, each with inputs of its own; their outputs are what is to be learnt."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights])
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's outputs."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


@dataclass
class Teacher:
    """What is to be learnt: the sum over the layers of the mean squared error of a row, on batches drawn by a seed.

    Attributes:
        inputs, goals: one tensor of rows for each layer.
        batch: rows of a training step; None for all of them.
    """

    inputs: Sequence[Tensor]
    goals: Sequence[Tensor]
    batch: int | None
    chance: torch.Generator

    def units(self, row: Any) -> int:
        """Count a step as one."""
        return 1

    def shortcuts(self, model: nn.Module, collate: Any, rows: Any) -> Any:
        """Take none."""
        return NONE

    def possible_shortcuts(self, model: nn.Module) -> Any:
        """Know of none."""
        return NONE

    def loss(self, model: nn.Module, batch: Any = None, shortcuts: Any = None) -> Tensor:
        """Return the loss on a batch while training, else on all rows."""
        inputs, goals = self.inputs, self.goals
        if model.training and self.batch is not None:
            rows = torch.randint(len(inputs[0]), (self.batch,), generator=self.chance)
            inputs, goals = [x[rows] for x in inputs], [y[rows] for y in goals]
        errors = [(out - y).square().sum(dim=-1).mean() for out, y in zip(model(inputs), goals, strict=True)]
        return torch.stack(errors).sum()


def planted(
    sizes: Sequence[tuple[int, int]], spectra: Sequence[Tensor], seed: int, batch: int | None = BATCH
) -> tuple[Regressions, Teacher]:
    """Return layers ``[d_out, d_in]``, and a teacher that differs by these singular values in random directions."""
    chance = torch.Generator().manual_seed(seed)

    def directions(size: int, count: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=chance)).Q[:, :count]

    weights, inputs, goals = [], [], []
    for (d_out, d_in), values in zip(sizes, spectra, strict=True):
        weight, x = 0.1 * torch.randn(d_out, d_in, generator=chance), torch.randn(ROWS, d_in, generator=chance)
        change = (directions(d_out, len(values)) * values) @ directions(d_in, len(values)).T
        weights.append(weight)
        inputs.append(x)
        goals.append(x @ (weight + change).T + NOISE * torch.randn(ROWS, d_out, generator=chance))
    return Regressions(weights), Teacher(inputs, goals, batch, chance)


def unit_spectra(ranks: Sequence[int]) -> list[Tensor]:
    """Return as many singular values of 1 as each layer's rank."""
    return [torch.ones(rank) for rank in ranks]


@dataclass(frozen=True)
class Trained:
    """A training that is over: its handle and loss on all rows."""

    handle: Handle
    loss: float

    @property
    def ranks(self) -> list[int]:
        """The ranks that are saved, 0 for a layer that is not."""
        sites = self.handle.state().sites
        return [int(sites[path].tensors["A"].shape[0]) if path in sites else 0 for path in self.handle.updates()]


def train(
    model: Regressions,
    teacher: Teacher,
    method: Method,
    num_steps: int,
    lr: float,
    seed: int,
    watch: Callable[[Stepper], None] = lambda stepper: None,
) -> Trained:
    """Attach and train with the loop's own steps (AdamW, a rate that falls to 0, no clipping)."""
    handle = attach(model, method, seed=seed)
    plan = Plan(num_steps=num_steps, batch_size=1, micro_batch=1, lr=lr, clip_norm=1e9)
    task: Any = teacher
    stepper = Stepper(handle, "default", task, lambda rows: {}, plan)
    watch(stepper)
    row: Any = SimpleNamespace(number=1, input_ids=[1])
    model.train()
    for _ in range(num_steps):
        stepper.step([row])
    model.eval()
    with torch.no_grad():
        return Trained(handle, float(teacher.loss(model)))


def distance(found: Sequence[int], expected: Sequence[int]) -> float:
    """Return the sum of differences between ranks."""
    return float(sum(abs(a - b) for a, b in zip(found, expected, strict=True)))


def spearman(first: Sequence[int], second: Sequence[int]) -> float:
    """Return Spearman's rank correlation; equal values share the mean of their places."""

    def places(values: Sequence[int]) -> Tensor:
        given = torch.tensor(values, dtype=torch.float64)
        below, equal = (given[:, None] > given).sum(1), (given[:, None] == given).sum(1)
        return below + (equal - 1) / 2

    return float(torch.corrcoef(torch.stack([places(first), places(second)]))[0, 1])
