"""``lorakit compress``: the error is known beforehand, and weighing layers against each other beats equal ranks."""

from __future__ import annotations

import torch
from experiments.gate import Found, Gate
from experiments.stepping import train
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import AdapterState, Handle
from lorakit.compose.compress import compress
from lorakit.compose.selection import KeepEnergy, KeepNumbers, KeepRank

RANK, ALPHA = 12, 18.0


SIZES = {"wide": (160, 48, 1, 0.5), "middle": (64, 48, 2, 0.5), "narrow": (24, 48, 12, 1.0)}
"""Layers side by side: ``d_out``, ``d_in``, and rank and size of the change that each is to learn."""


class SideBySide(nn.Module):
    """Layers that read the same input and write their own outputs."""

    def __init__(self) -> None:
        super().__init__()
        for name, (d_out, d_in, _, _) in SIZES.items():
            self.add_module(name, nn.Linear(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return all outputs."""
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def trained(seed: int) -> tuple[Handle, Tensor, Tensor]:
    """Train an adapter whose layers need different ranks."""
    torch.manual_seed(seed)
    model, x = SideBySide(), torch.randn(512, 48)
    changes = [
        size * torch.randn(d_out, rank) @ torch.randn(rank, d_in) / (rank * d_in) ** 0.5
        for d_out, d_in, rank, size in SIZES.values()
    ]
    with torch.no_grad():
        goal = model(x) + x @ torch.cat(changes).T
    handle = lk.attach(model, lk.LoRA(rank=RANK, alpha=ALPHA), list(SIZES), seed=seed)
    train(handle, lambda model: (model(x) - goal).square().mean(), 150, 0.01)
    return handle, x, goal


def loss_with(handle: Handle, state: AdapterState, x: Tensor, goal: Tensor) -> float:
    name = f"cut{len(handle.names)}"
    handle.add_state(state, name)
    with torch.no_grad(), handle.using(name):
        return float((handle.model(x) - goal).square().mean())


def predicted(seed: int) -> Found:
    """Return how far the predicted error is from the one of dense matrices, over several shares."""
    handle, _, _ = trained(seed)
    before, deltas = handle.state(), {path: handle.delta(path).double() for path in handle.updates()}
    norm = sum(float(delta.square().sum()) for delta in deltas.values()) ** 0.5
    worst, errors = 0.0, {}
    for share in (0.5, 0.9, 0.99):
        found = compress(before, KeepEnergy(share=share))
        handle.add_state(found.state, f"cut{share:g}".replace(".", "-"))
        cut = handle.names[-1]
        kept = {path: handle.delta(path, cut).double() for path in found.state.sites}
        lost = sum(float((delta - kept.get(path, 0.0)).square().sum()) for path, delta in deltas.items()) ** 0.5 / norm
        worst = max(worst, *(abs(each / found.predicted_error - 1) for each in (lost, found.measured_error)))
        errors[f"error at {share:g}"] = found.predicted_error
    return Found(worst, errors)


def pooled(seed: int) -> Found:
    """Return the error of pooled selection over that of equal ranks, at equal numbers."""
    handle, x, goal = trained(seed)
    before = handle.state()
    equal = compress(before, KeepRank(rank=3))
    numbers = sum(cut.numbers_after for cut in equal.layers)
    best = compress(before, KeepNumbers(budget=numbers))
    losses = [loss_with(handle, found.state, x, goal) for found in (best, equal)]
    with torch.no_grad(), handle.disabled():
        base = float((handle.model(x) - goal).square().mean())
    return Found(
        best.predicted_error / equal.predicted_error,
        {"numbers": numbers, "loss": losses[0], "loss, equal ranks": losses[1], "loss of the base": base},
    )


def doras_weights(seed: int) -> Found:
    """Return the relative error of the change of DoRA's weights over the predicted one of its pair."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(96, 64))
    x, goal = torch.randn(256, 96), torch.randn(256, 64)
    handle = lk.attach(model, lk.DoRA(rank=8, alpha=16.0), "0", seed=seed)
    train(handle, lambda model: (model(x) - goal).square().mean(), 60, 0.01)
    delta = handle.delta("0")
    found = compress(handle.state(), KeepEnergy(share=0.9))
    handle.add_state(found.state, "cut")
    error = float((handle.delta("0", "cut") - delta).norm() / delta.norm())
    return Found(error / found.predicted_error, {"predicted": found.predicted_error, "measured": error})


GATES: list[Gate] = [
    Gate(
        "compress",
        "The error that the components left out predict is the one of the dense matrices, at three shares.",
        "<= 1e-5 relative",
        predicted,
        lambda value: value <= 1e-5,
        source="Eckart, Young 1936",
    ),
    Gate(
        "compress",
        "Pooled over the layers of an adapter that needs uneven ranks, as many numbers lose less than equal ranks do.",
        "<= 0.5 of equal ranks' error",
        pooled,
        lambda value: value <= 0.5,
        source="derived",
    ),
    Gate(
        "compress",
        "DoRA: the relative error of the weights' change, whose norm the pair changes, over the one of the pair.",
        "reported",
        doras_weights,
        None,
        source="derived",
    ),
]
