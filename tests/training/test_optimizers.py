"""Each optimizer against torch's own, and its state as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lorakit.adapters import attach
from lorakit.methods import Rule
from lorakit.methods.lora import LoRA
from lorakit.training.optimizers import MOMENTUM, OPTIMIZERS, load_state_tensors, optimizer_for, state_tensors

Make = Callable[[list[nn.Parameter]], Optimizer]

PLAIN: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, momentum=MOMENTUM),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.01),
}
# The fused forms round products and sums in another order: some units in the last place of fp32 a step.
FUSED = 1e-6


def adapted() -> Any:
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), LoRA(rank=2), seed=1)


def steps(handle: Any, optimizer: Optimizer, count: int, seed: int = 0) -> None:
    """Take steps with gradients that follow from the seed."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in handle.parameters().values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


def values(handle: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in handle.parameters().values()]


def test_all_optimizers_are_tested() -> None:
    assert PLAIN.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_those_of_torch(name: str) -> None:
    ours, theirs = adapted(), adapted()
    steps(ours, optimizer_for(Rule({}, 5), ours.parameters(), name, lr=0.1, weight_decay=0.01), 5)
    steps(theirs, PLAIN[name](list(theirs.parameters().values())), 5)
    for found, expected in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=FUSED, atol=FUSED)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(name: str, before: int) -> None:
    whole, first = adapted(), adapted()
    optimizer = optimizer_for(Rule({}, 5), whole.parameters(), name, lr=0.1, weight_decay=0.01)
    steps(whole, optimizer, before, seed=1)
    tensors = state_tensors(optimizer, whole.parameters())
    middle = values(whole)
    steps(whole, optimizer, 3, seed=2)

    with torch.no_grad():
        for parameter, value in zip(first.parameters().values(), middle, strict=True):
            parameter.copy_(value)
    again = optimizer_for(Rule({}, 5), first.parameters(), name, lr=0.1, weight_decay=0.01)
    load_state_tensors(again, first.parameters(), tensors)
    steps(first, again, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(first), strict=True))


def test_adafactor_remembers_less_than_adamw() -> None:
    sizes = {}
    for name in ("adamw", "adafactor"):
        handle = adapted()
        optimizer = optimizer_for(Rule({}, 5), handle.parameters(), name, lr=0.1, weight_decay=0.0)
        steps(handle, optimizer, 1)
        sizes[name] = sum(tensor.numel() for tensor in state_tensors(optimizer, handle.parameters()).values())
    assert sizes["adafactor"] < sizes["adamw"]
