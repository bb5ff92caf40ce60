"""CorDA: the pair takes what the examples use most of a weight, or least."""

from __future__ import annotations

import torch
from experiments.gate import Found, Gate
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.inits import Calibration
from lorakit.inits.corda import CorDA
from lorakit.inits.pissa import PiSSA
from lorakit.methods.lora import LoRA, LowRankUpdate

RANK, ALPHA = 8, 20.0
D_OUT, D_IN, ROWS = 96, 128, 512
PAPER = "Yang et al. 2024, arXiv 2406.05223"


class One(nn.Module):
    """One layer of 96 x 128."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.layer(x)


def inputs(count: int) -> Tensor:
    """Return inputs with deviations 1/i along random directions."""
    return torch.randn(count, D_IN) / torch.arange(1, D_IN + 1) @ torch.linalg.qr(torch.randn(D_IN, D_IN)).Q


def examples(x: Tensor) -> Calibration:
    return Calibration([{"x": rows} for rows in x.split(64)])


def taken(model: One, method: LoRA, x: Tensor) -> float:
    """Return the share of the layer's output on ``x`` that stands in the pair at the start."""
    handle = attach(model, method, "layer", seed=0, calibration=examples(x))
    update = handle.updates()["layer"]
    assert isinstance(update, LowRankUpdate)
    assert update.A0 is not None
    assert update.B0 is not None
    share = (x @ update.A0.T @ update.B0.T * update.scale).norm() / model.layer(x).norm()
    handle.detach()
    return float(share.detach())


def uses(seed: int) -> Found:
    torch.manual_seed(seed)
    model, x = One(), inputs(ROWS)
    found = {
        "task": taken(model, LoRA(rank=RANK, alpha=ALPHA, init=CorDA(keep="task", rows=ROWS)), x),
        "knowledge": taken(model, LoRA(rank=RANK, alpha=ALPHA, init=CorDA(keep="knowledge", rows=ROWS)), x),
        "PiSSA": taken(model, LoRA(rank=RANK, alpha=ALPHA, init=PiSSA()), x),
    }
    return Found(found["task"] / found["PiSSA"], found)


def protects(seed: int) -> Found:
    found = uses(seed)
    return Found(found.beside["knowledge"], found.beside)


def forgets(seed: int) -> Found:
    """Return how much learning a new task changes the outputs on the examples, against plain LoRA."""
    torch.manual_seed(seed)
    model, known, new = One(), inputs(ROWS), inputs(ROWS)
    goal = model.layer(new).detach() + new @ (torch.randn(D_OUT, D_IN) / D_IN**0.5).T
    before = model.layer(known).detach()
    found = {}
    for name, init in (("knowledge", CorDA(keep="knowledge", rows=ROWS)), ("plain LoRA", "kaiming")):
        results = []
        for lr in (2.0**k for k in range(-10, -4)):
            handle = attach(
                model, LoRA(rank=RANK, alpha=ALPHA, init=init), "layer", seed=0, calibration=examples(known)
            )
            optimizer = torch.optim.AdamW(handle.parameters().values(), lr, weight_decay=0.0)
            for _ in range(60):
                optimizer.zero_grad()
                loss = (model(new) - goal).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                moved = float((model(known) - before).square().mean() / before.square().mean())
                results.append((float((model(new) - goal).square().mean()), moved))
            handle.detach()
        found[f"{name}: loss"], found[f"{name}: moved"] = min(results)
    return Found(found["knowledge: moved"] / found["plain LoRA: moved"], found)


GATES: list[Gate] = [
    Gate(
        "corda",
        "With keep='task' the pair holds more of the layer's output on the examples than the weight's principal part.",
        "> 1 times PiSSA's share",
        uses,
        lambda value: value > 1.0,
        source=PAPER,
    ),
    Gate(
        "corda",
        "With keep='knowledge' the pair holds next to nothing of the layer's output on the examples.",
        "<= 0.05 of it",
        protects,
        lambda value: value <= 0.05,
        source=PAPER,
    ),
    Gate(
        "corda",
        "With keep='knowledge', learning something new moves the outputs on the examples by, of plain LoRA's share:",
        "reported",
        forgets,
        None,
        source=PAPER,
    ),
]
