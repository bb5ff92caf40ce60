"""A planted change of one layer's weight, and how far an adapter comes with it from a given start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach
from lorakit.inits import Calibration
from lorakit.methods.lora import LoRA

D_OUT, D_IN = 96, 128
EVERY_ROW = 2 * D_IN
RATES = {"sgd": [2.0**k for k in range(-5, 1)], "adamw": [2.0**k for k in range(-9, -3)]}


@dataclass(frozen=True)
class Change:
    """A frozen layer of 96 x 128, and a change of its weight that is to be learnt.

    The inputs' columns are orthogonal and of one size, so that the mean loss of an update is the share of the change
    that it misses, ``||change - update||^2 / ||change||^2``.

    Attributes:
        seed: of the weight, the inputs and the change.
        power: the change's i-th singular value is ``2 / i^power``; 0 gives a gaussian matrix of the same norm as 1.
    """

    seed: int
    power: float = 1.0

    def attached(self, method: LoRA) -> tuple[Handle, Tensor, Tensor]:
        """Return an adapter on the layer, the inputs and the outputs to learn."""
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
        x = torch.linalg.qr(torch.randn(EVERY_ROW, D_IN)).Q * math.sqrt(EVERY_ROW)
        goal = (model(x) + x @ self.matrix().T).detach()
        batches = [{"x": x[i::4], "goal": goal[i::4]} for i in range(4)]  # parts, whose gradients must be added up
        calibration = Calibration(
            batches, loss=lambda model, batch: self.loss(model, batch["x"], batch["goal"]), counted=lambda batch: None
        )
        return attach(model, method, "0", seed=self.seed, calibration=calibration), x, goal

    def matrix(self) -> Tensor:
        """Return the change."""
        if self.power == 0.0:
            found = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(self.seed))
            return found * 2 * math.sqrt(1.63) / found.norm()
        generator = torch.Generator().manual_seed(self.seed)
        U, V = (torch.linalg.qr(torch.randn(size, D_OUT, generator=generator)).Q for size in (D_OUT, D_IN))
        return (U * (2 / torch.arange(1, D_OUT + 1) ** self.power)) @ V.T

    def loss(self, model: nn.Module, x: Tensor, goal: Tensor) -> Tensor:
        """Return the share of the change that is missed."""
        return (model(x) - goal).square().sum() / len(x) / self.matrix().square().sum()

    def floor(self, rank: int) -> float:
        """Return the least share that an update of this rank can miss (Eckart and Young 1936)."""
        squares = torch.linalg.svdvals(self.matrix()).square()
        return float(squares[rank:].sum() / squares.sum())

    def reachable(self, rank: int) -> float:
        """Return the cosine between this change and its best approximation of a rank."""
        return math.sqrt(1.0 - self.floor(rank))

    def missed(self, method: LoRA, kind: str, lr: float, num_steps: int = 60) -> float:
        """Return what is missed after some steps at a constant rate; infinite where they diverged."""
        handle, x, goal = self.attached(method)
        parameters = list(handle.parameters().values())
        sgd = kind == "sgd"
        optimizer = torch.optim.SGD(parameters, lr) if sgd else torch.optim.AdamW(parameters, lr, weight_decay=0.0)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = self.loss(handle.model, x, goal)
            if not bool(loss < 10.0):
                return math.inf
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            return float(self.loss(handle.model, x, goal))

    def best(self, method: LoRA, kind: str, num_steps: int = 60) -> float:
        """Return what is missed at the best of six rates, a factor 2 apart."""
        return min(self.missed(method, kind, lr, num_steps) for lr in RATES[kind])


def first_step(change: Change, method: LoRA, lr: float = 1e-4) -> float:
    """Return the cosine between the weight's first change by gradient descent and the loss's negative gradient.

    The steps are small, so that what is of second order in them does not count.
    """
    handle, x, goal = change.attached(method)
    before = handle.delta("0")
    change.loss(handle.model, x, goal).backward()  # type: ignore[no-untyped-call]
    missing = change.matrix() - before
    with torch.no_grad():
        for parameter in handle.parameters().values():
            assert parameter.grad is not None
            parameter -= lr * parameter.grad
    step = handle.delta("0") - before
    return float((step * missing).sum() / (step.norm() * missing.norm()))
