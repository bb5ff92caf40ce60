"""Small regressions that the training loop's own steps learn, for methods whose ranks change while they train."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle
from lorakit.training.plan import Plan
from lorakit.training.stepper import Stepper
from lorakit.training.tasks.shortcuts import NONE


class Layers(nn.Module):
    """Independent linear layers of these sizes ``(d_out, d_in)``."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(d_in, d_out) for d_out, d_in in sizes])

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


class Goal:
    """Squared errors, as a task of the training loop; with ``batch`` on rows drawn anew for each step."""

    def __init__(self, inputs: Sequence[Tensor], goals: Sequence[Tensor], batch: int | None = None) -> None:
        self.inputs, self.goals, self.batch = inputs, goals, batch

    def units(self, row: Any) -> int:
        return 1

    def shortcuts(self, model: nn.Module, collate: Any, rows: Any) -> Any:
        return NONE

    def possible_shortcuts(self, model: nn.Module) -> Any:
        return NONE

    def loss(self, model: nn.Module, batch: Any = None, shortcuts: Any = None) -> Tensor:
        inputs, goals = self.inputs, self.goals
        if self.batch is not None and model.training:
            rows = torch.randint(len(inputs[0]), (self.batch,))
            inputs, goals = [x[rows] for x in inputs], [y[rows] for y in goals]
        errors = [(o - y).square().sum(-1).mean() for o, y in zip(model(inputs), goals, strict=True)]
        return torch.stack(errors).sum()


def planted(sizes: Sequence[tuple[int, int]], ranks: Sequence[int], batch: int | None = 64) -> tuple[Layers, Goal]:
    """Return layers, and as a goal what they would give with updates of these ranks, singular values 1."""
    model = Layers(sizes)
    inputs = [torch.randn(256, d_in) for _, d_in in sizes]
    goals = []
    for layer, x, (d_out, d_in), rank in zip(model.layers, inputs, sizes, ranks, strict=True):
        U, V = torch.linalg.qr(torch.randn(d_out, d_out)).Q, torch.linalg.qr(torch.randn(d_in, d_in)).Q
        noise = 0.05 * torch.randn(len(x), d_out)
        goals.append((layer(x) + x @ (U[:, :rank] @ V[:, :rank].T).T + noise).detach())
    return model, Goal(inputs, goals, batch)


def stepper_of(handle: Handle, goal: Any, num_steps: int, lr: float = 2e-2, **fields: Any) -> Stepper:
    """Return the loop's stepper on this goal."""
    plan = Plan(num_steps=num_steps, batch_size=1, micro_batch=1, lr=lr, clip_norm=1e9, **fields)
    told: list[str] = []
    stepper = Stepper(handle, "default", goal, lambda rows: {}, plan, told=lambda name, text: told.append(text))
    stepper.heard = told  # type: ignore[attr-defined]
    handle.model.train()
    return stepper


def steps(stepper: Stepper, count: int) -> None:
    """Take some steps."""
    row: Any = SimpleNamespace(number=1, input_ids=[1])
    for _ in range(count):
        stepper.step([row])
