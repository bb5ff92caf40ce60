"""A layer whose weight has a spectrum, a change of it to be learnt, and adapters that start from the weight."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from experiments.stepping import train
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle

D_OUT, D_IN, RANK, ALPHA = 96, 128, 8, 16.0
RATES = {"sgd": [2.0**k for k in range(-7, 4)], "adamw": [2.0**k for k in range(-10, -2)]}


def method(init: object, rank: int = RANK) -> lk.LoRA:
    """Return LoRA with an init, alpha other than the rank."""
    return lk.LoRA(rank=rank, alpha=ALPHA, init=init)


@dataclass(frozen=True)
class Tuned:
    """A layer of 96 x 128 with singular values ``4 / sqrt(i)``, and a change of rank 8 to be learnt.

    The inputs' columns are orthogonal and of one size, so that the loss is the share of the change that is missed,
    ``||change - update||^2 / ||change||^2``. A pair of rank 8 can learn all of it.

    Attributes:
        seed: of the weight, the inputs and the change.
        place: where the change lies: in the weight's 'top' or 'minor' 8 directions on both sides, or anywhere.
    """

    seed: int
    place: str = "anywhere"

    def attached(self, method: lk.LoRA) -> tuple[Handle, Tensor, Tensor]:
        """Return an adapter on the layer, the inputs and the outputs to learn."""
        draw = torch.Generator().manual_seed(self.seed)

        def orthonormal(size: int, count: int) -> Tensor:
            return torch.linalg.qr(torch.randn(size, count, generator=draw)).Q

        U, V = orthonormal(D_OUT, D_OUT), orthonormal(D_IN, D_OUT)
        W = (U * (4.0 / torch.arange(1, D_OUT + 1).sqrt())) @ V.T
        sides = {
            "top": (U[:, :RANK], V[:, :RANK]),
            "minor": (U[:, -RANK:], V[:, -RANK:]),
            "anywhere": (orthonormal(D_OUT, RANK), orthonormal(D_IN, RANK)),
        }
        left, right = sides[self.place]
        turn = orthonormal(RANK, RANK)
        change = (left * (1.0 / torch.arange(1, RANK + 1).sqrt())) @ turn @ right.T
        model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(W)
        x = torch.linalg.qr(torch.randn(2 * D_IN, D_IN, generator=draw)).Q * math.sqrt(2 * D_IN)
        goal = x @ (W + change).T
        return lk.attach(model, method, "0", seed=self.seed), x, goal

    def missed(self, method: lk.LoRA, kind: str, lr: float, num_steps: int) -> float:
        """Return what is missed after some steps at a constant rate; infinite where they diverged."""
        handle, x, goal = self.attached(method)
        size = (goal - x @ handle.model.get_parameter("0.weight").T).square().mean().detach()

        def loss(model: nn.Module) -> Tensor:
            return (model(x) - goal).square().mean() / size

        try:
            train(handle, loss, num_steps, lr, kind)
        except torch.linalg.LinAlgError:
            return math.inf
        with torch.no_grad():
            found = float(loss(handle.model))
        return found if math.isfinite(found) else math.inf

    def best(self, method: lk.LoRA, kind: str, num_steps: int) -> tuple[float, float]:
        """Return what is missed at the best of the rates, a factor 2 apart, and that rate."""
        return min((self.missed(method, kind, lr, num_steps), lr) for lr in RATES[kind])


def network(seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Return a small network of layers of several kinds, none square, and inputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Flatten(1), nn.Linear(12 * 36, 40), nn.Tanh(), nn.Linear(40, 24)
    )
    return model.to(dtype).eval(), torch.randn(16, 3, 8, 8).to(dtype)


def at_the_start(seed: int, init: object, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest difference that attaching makes to a network's outputs."""
    model, x = network(seed, dtype)
    with torch.no_grad():
        before = model(x)
        lk.attach(model, method(init), ["0", "3", "5"], seed=seed)
        return float((model(x) - before).abs().max())


def after_saving(seed: int, init: object) -> tuple[float, float]:
    """Return the largest difference of outputs between a trained model and its base with the saved adapter.

    And beside it how far training has moved the outputs.
    """
    model, x = network(seed)
    goal = torch.randn(16, 24)
    with torch.no_grad():
        before = model(x)
    handle = lk.attach(model, method(init), ["0", "3", "5"], seed=seed)
    train(handle, lambda model: (model(x) - goal).square().mean(), 30, 0.01)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(x)
        lk.save(handle, Path(folder))
        pristine, _ = network(seed)
        lk.load(pristine, Path(folder))
        return float((pristine(x) - expected).abs().max()), float((expected - before).abs().max())
