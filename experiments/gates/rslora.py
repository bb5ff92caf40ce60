"""rsLoRA: the factor alpha / sqrt(rank) keeps the gradient's size, whatever the rank."""

from __future__ import annotations

import functools
import math

import torch
from experiments.gate import Found, Gate
from experiments.stepping import gradient_norm, gradients, train
from torch import nn

import lorakit as lk

WIDTH, OUT, ROWS = 256, 320, 64
RANKS = (4, 16, 64, 256)
ALPHA, LR, STEPS = 24.0, 1e-4, 30


def slope(method: str, optimizer: str, seed: int) -> Found:
    """Return the slope of log gradient norm in log rank after training, by least squares."""
    norms = {}
    for rank in RANKS:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False))
        x, goal = torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUT)

        def loss(model: nn.Module, x: torch.Tensor = x, goal: torch.Tensor = goal) -> torch.Tensor:
            return (model(x) - goal).square().mean()

        handle = lk.attach(model, {"name": method, "rank": rank, "alpha": ALPHA}, "0", seed=seed)
        train(handle, loss, STEPS, LR, optimizer)
        gradients(handle, loss)
        norms[rank] = gradient_norm(handle)
    logs = torch.tensor([[math.log(rank), math.log(norm)] for rank, norm in norms.items()])
    x_log, y_log = (logs - logs.mean(dim=0)).unbind(dim=1)
    return Found(float(x_log @ y_log / (x_log @ x_log)), {f"norm at rank {rank}": norm for rank, norm in norms.items()})


def _gate(method: str, optimizer: str) -> Gate:
    stable = method == "rslora"
    size = "keeps its size" if stable else "shrinks by about 1 / sqrt(rank)"
    return Gate(
        method="rslora",
        claim=f"With {'rsLoRA' if stable else 'plain LoRA'} the adapter's gradient {size} from rank 4 to rank 256 "
        f"(slope of logarithms after {STEPS} steps of {optimizer}).",
        criterion="|slope| <= 0.1" if stable else "slope <= -0.4",
        measure=functools.partial(slope, method, optimizer),
        passes=(lambda value: abs(value) <= 0.1) if stable else (lambda value: value <= -0.4),
        source="Kalajdzievski 2023, arXiv 2312.03732",
    )


GATES = [_gate(method, optimizer) for method in ("rslora", "lora") for optimizer in ("sgd", "adamw")]
