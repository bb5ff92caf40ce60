"""LoRA-One: the start is a step of gradient descent, and the saved adapter a plain pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.methods.lora import LoRA

RANK, ALPHA, GAMMA = 4, 9.0, 128.0
D_OUT, D_IN, ROWS = 40, 56, 128
DECOMPOSED = 1e-4  # fp32 through a decomposition of 40 x 56 numbers


@pytest.fixture(params=[0, 1])
def task(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a layer, inputs, and what to learn."""
    torch.manual_seed(request.param)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    x = torch.linalg.qr(torch.randn(ROWS, D_IN)).Q
    U, V = torch.linalg.qr(torch.randn(D_OUT, D_OUT)).Q, torch.linalg.qr(torch.randn(D_IN, D_OUT)).Q
    return model, x, (model(x) + x @ ((U / torch.arange(1, D_OUT + 1)) @ V.T).T).detach()


def loss(model: nn.Module, x: Tensor, goal: Tensor) -> Tensor:
    return (model(x) - goal).square().sum()


def attached(task: tuple[nn.Module, Tensor, Tensor], **fields: Any) -> Handle:
    model, x, goal = task
    batches = [{"x": a, "goal": b} for a, b in zip(x.split(64), goal.split(64), strict=True)]
    calibration = lk.Calibration(batches, lambda model, batch: loss(model, batch["x"], batch["goal"]))
    method = LoRA(**{"rank": RANK, "alpha": ALPHA, "init": {"name": "loraone", "rows": ROWS}, **fields})
    return lk.attach(model, method, "0", calibration=calibration, seed=0)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_start_is_the_best_step_of_rank_r_down_the_gradient(
    task: tuple[nn.Module, Tensor, Tensor], scaling: str
) -> None:
    (gradient,) = torch.autograd.grad(loss(*task), list(task[0].parameters()))
    U, S, Vh = torch.linalg.svd(gradient)
    scale = ALPHA / RANK if scaling == "standard" else ALPHA / RANK**0.5
    expected = -scale / GAMMA * (U[:, :RANK] * S[:RANK] / S[0]) @ Vh[:RANK]
    found = attached(task, scaling=scaling).delta("0")
    torch.testing.assert_close(found, expected, rtol=0, atol=DECOMPOSED * float(expected.abs().max()) * 10)


def test_the_loss_at_the_start_is_below_the_bases(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    base = float(loss(*task).detach())
    attached(task)
    assert float(loss(*task).detach()) < base


def test_that_the_outputs_change_is_declared(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    assert attached(task).entry("default").method.changes_start()


def test_the_saved_adapter_is_a_pair_of_the_same_rank(task: tuple[nn.Module, Tensor, Tensor]) -> None:
    tensors = attached(task).state().sites["0"].tensors
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"A": (RANK, D_IN), "B": (D_OUT, RANK)}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_learns_a_planted_change_sooner_than_plain_lora(task: tuple[nn.Module, Tensor, Tensor], kind: str) -> None:
    def left(handle: Handle, lr: float) -> float:
        parameters = list(handle.parameters().values())
        optimizer = torch.optim.SGD(parameters, lr) if kind == "sgd" else torch.optim.AdamW(parameters, lr)
        for _ in range(15):
            optimizer.zero_grad()
            loss(*task).backward()
            optimizer.step()
        found = float(loss(*task).detach())
        handle.detach()
        return found

    rates = [0.05, 0.1, 0.2] if kind == "sgd" else [0.01, 0.02, 0.04]
    plain = min(left(attached(task, init="kaiming"), lr) for lr in rates)
    assert min(left(attached(task), lr) for lr in rates) <= 0.8 * plain
