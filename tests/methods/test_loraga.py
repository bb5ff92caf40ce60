"""LoRA-GA: the first step is the gradient's best approximation of rank 2r, the function at the start the base's."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.inits.loraga import USUAL_OFFSET, LoRAGA
from lorakit.methods.lora import LoRA, LowRankUpdate

RANK, ALPHA = 4, 9.0
D_OUT, D_IN, ROWS = 40, 56, 128
# fp32 through a decomposition of 40 x 56 numbers.
DECOMPOSED = 1e-4


def planted(seed: int, power: float) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a layer, inputs whose columns are orthogonal, what to learn, and the missing matrix."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    x = torch.linalg.qr(torch.randn(ROWS, D_IN)).Q
    U, V = torch.linalg.qr(torch.randn(D_OUT, D_OUT)).Q, torch.linalg.qr(torch.randn(D_IN, D_OUT)).Q
    missing = (U / torch.arange(1, D_OUT + 1) ** power) @ V.T
    return model, x, (model(x) + x @ missing.T).detach(), missing


def loss(model: nn.Module, x: Tensor, goal: Tensor) -> Tensor:
    return (model(x) - goal).square().sum()


def calibration(x: Tensor, goal: Tensor) -> lk.Calibration:
    batches = [{"x": a, "goal": b} for a, b in zip(x.split(32), goal.split(32), strict=True)]
    return lk.Calibration(batches, lambda model, batch: loss(model, batch["x"], batch["goal"]))


def attached(model: nn.Module, x: Tensor, goal: Tensor, **fields: Any) -> Handle:
    init = {"name": "loraga", "rows": ROWS, **fields.pop("init", {})}
    method = LoRA(rank=RANK, alpha=ALPHA, **{"init": init, **fields})
    return lk.attach(model, method, "0", calibration=calibration(x, goal), seed=0)


def cosine_of_the_first_step(handle: Handle, x: Tensor, goal: Tensor, missing: Tensor) -> float:
    loss(handle.model, x, goal).backward()
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter -= 1e-3 * parameter.grad
    step = handle.delta("0")
    return float((step * missing).sum() / step.norm() / missing.norm())


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_step_is_the_best_that_rank_2r_allows(seed: int, power: float, scaling: str) -> None:
    model, x, goal, missing = planted(seed, power)
    squares = torch.linalg.svdvals(missing).square()
    bound = float((squares[: 2 * RANK].sum() / squares.sum()).sqrt())
    assert cosine_of_the_first_step(attached(model, x, goal, scaling=scaling), x, goal, missing) >= 0.99 * bound


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_step_points_several_times_better_than_plain_loras(seed: int) -> None:
    model, x, goal, missing = planted(seed, 1.0)
    handle = lk.attach(model, LoRA(rank=RANK, alpha=ALPHA), "0", seed=seed)
    before = cosine_of_the_first_step(handle, x, goal, missing)
    handle.detach()
    assert cosine_of_the_first_step(attached(model, x, goal), x, goal, missing) >= 2.5 * before


def start_of(handle: Handle) -> LowRankUpdate:
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    return update


def test_a_gamma_that_is_given_is_the_papers_factor() -> None:
    model, x, goal, _ = planted(0, 1.0)
    update = start_of(attached(model, x, goal, init={"gamma": 512.0}))
    assert update.A0 is not None
    assert update.B0 is not None
    size = D_OUT**0.25 / 512.0**0.5
    torch.testing.assert_close(update.A0.norm(dim=1), torch.full((RANK,), size), rtol=DECOMPOSED, atol=0)
    torch.testing.assert_close(update.B0.norm(dim=0), torch.full((RANK,), size), rtol=DECOMPOSED, atol=0)


def test_without_one_the_offset_is_a_small_share_of_the_weight() -> None:
    model, x, goal, _ = planted(0, 1.0)
    update = start_of(attached(model, x, goal))
    assert update.A0 is not None
    assert update.B0 is not None
    offset = torch.linalg.matrix_norm(update.scale * update.B0 @ update.A0, 2)
    own = torch.linalg.matrix_norm(model.get_parameter("0.weight"), 2)
    # the weight's largest singular value comes from a few power iterations: from below, to some percent
    assert float((offset / own).detach()) == pytest.approx(USUAL_OFFSET, rel=0.1)


def test_an_offset_that_is_too_large_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x, goal, _ = planted(0, 1.0)
    with caplog.at_level(logging.WARNING):
        attached(model, x, goal, init={"gamma": 2.0})
    assert "offset of up to" in caplog.text
    assert "Use gamma >= " in caplog.text


def test_the_gamma_that_the_log_advises_is_large_enough(caplog: pytest.LogCaptureFixture) -> None:
    model, x, goal, _ = planted(0, 1.0)
    with caplog.at_level(logging.WARNING):
        attached(model, x, goal, init={"gamma": 2.0}).detach()
        advised = float(caplog.text.split("gamma >= ")[1].split(",")[0])
        caplog.clear()
        attached(model, x, goal, init={"gamma": advised})
    assert not caplog.text


def test_a_side_below_2r_is_covered_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30, bias=False))
    x, goal = torch.randn(64, 5), torch.randn(64, 30)
    (gradient,) = torch.autograd.grad(loss(model, x, goal), list(model.parameters()))
    method = LoRA(rank=4, alpha=9.0, init=LoRAGA(rows=64))
    update = start_of(lk.attach(model, method, "0", calibration=calibration(x, goal), seed=0))
    assert update.A0 is not None
    assert update.B0 is not None
    P, Q = (torch.linalg.qr(basis).Q for basis in (update.B0, update.A0.T))
    left = gradient - P @ P.T @ gradient
    assert float((left - left @ Q @ Q.T).norm()) <= DECOMPOSED * float(gradient.norm())


def test_it_learns_a_planted_change_sooner_than_plain_lora() -> None:
    model, x, goal, _ = planted(0, 1.0)

    def left(handle: Handle) -> float:
        optimizer = torch.optim.SGD(handle.parameters().values(), lr=0.1)
        for _ in range(25):
            optimizer.zero_grad()
            loss(model, x, goal).backward()
            optimizer.step()
        found = float(loss(model, x, goal).detach())
        handle.detach()
        return found

    plain = left(lk.attach(model, LoRA(rank=RANK, alpha=ALPHA), "0", seed=0))
    assert left(attached(model, x, goal)) <= 0.8 * plain


def test_an_expert_that_no_row_has_reached_starts_as_in_plain_lora() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("edo,bd->ebo", self.weight[:2], x)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x)

    model, x = Holder(), torch.randn(6, 8)
    batches = lk.Calibration([{"x": x}], lambda model, batch: model(batch["x"]).square().mean())
    handle = lk.attach(model, LoRA(rank=2, alpha=5.0, init="loraga"), "experts.weight", calibration=batches, seed=0)
    update = handle.updates()["experts.weight"]
    assert isinstance(update, LowRankUpdate)
    assert update.B0 is not None
    reached = update.B0.flatten(1).any(dim=1)
    assert reached.tolist() == [True, True, False]
