"""Steps as the training loop takes them, and the gradient of a weight that an adapter stands on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach, handle_of
from lorakit.layers import Site
from lorakit.methods import Method, Rule
from lorakit.training.optimizers import optimizer_for

Loss = Callable[[nn.Module], Tensor]


def train(handle: Handle, loss: Loss, num_steps: int, lr: float, kind: str = "adamw") -> Rule:
    """Take steps at a constant rate with the method's own rule and groups, without clipping; return the rule."""
    rule = handle.entry("default").method.rule(handle.updates(), num_steps)
    optimizer = optimizer_for(rule, handle.parameters(), kind, lr, 0.0)
    for step in range(1, num_steps + 1):
        gradients(handle, loss)
        rule.before_step(step)
        optimizer.step()
        rule.after_step(step)
    return rule


def gradients(handle: Handle, loss: Loss) -> None:
    """Give the adapter's parameters the gradients of a loss."""
    for parameter in handle.parameters().values():
        parameter.grad = None
    loss(handle.model).backward()


def gradient_norm(handle: Handle) -> float:
    """Return the norm of all the adapter's gradients together."""
    found = [p.grad.flatten() for p in handle.parameters().values() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.cat(found)))


def weight_gradient(handle: Handle, path: str, loss: Loss) -> Tensor:
    """Return the loss's gradient by a layer's updated weight as a matrix in fp64, from a plain twin of the model."""
    deltas = {each: handle.delta(each) for each in handle.updates()}
    twin = copy.deepcopy(handle.model)
    own = handle_of(twin)
    assert own is not None
    own.detach()
    weight = Site.at(twin, path).ops.weight(Site.at(twin, path).layer)
    with torch.no_grad():
        for each, delta in deltas.items():
            site = Site.at(twin, each)
            site.ops.weight(site.layer).add_(site.ops.as_weight(site.layer, delta))
    weight.requires_grad_(True)
    loss(twin).backward()
    assert weight.grad is not None
    site = Site.at(twin, path)
    return site.ops.as_matrix(site.layer, weight.grad).double()


def projection(columns: Tensor) -> Tensor:
    """Return the projection onto the span of a matrix's columns, in fp64."""
    Q = torch.linalg.qr(columns.detach().double()).Q
    return Q @ Q.mT


def relative(found: Tensor, expected: Tensor) -> float:
    """Return ``||found - expected|| / ||expected||``."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@dataclass(frozen=True)
class Planted:
    """A frozen layer of 96 x 128 and a change of its weight to be learnt, with singular values 1, 1/2^.5, 1/3^.5, ...

    The inputs' columns are orthogonal and of one size, so that the error of an update is
    ``||change - update||^2 / ||change||^2``, which no update of rank r brings below ``floor(r)`` (Eckart and Young).

    Attributes:
        seed: of the weight, the inputs and the change.
    """

    seed: int

    def error(self, method: Method, lr: float, num_steps: int, kind: str = "adamw") -> float:
        """Return the error after some steps; infinite where training has diverged."""
        torch.manual_seed(self.seed)
        model = nn.Sequential(nn.Linear(128, 96, bias=False))
        x = torch.linalg.qr(torch.randn(256, 128)).Q * math.sqrt(256)
        U, V = torch.linalg.qr(torch.randn(96, 96)).Q, torch.linalg.qr(torch.randn(128, 96)).Q
        values = torch.arange(1, 97).rsqrt()
        goal = (model(x) + x @ ((U * values) @ V.T).T).detach()
        size = (goal - model(x)).square().mean().detach()

        def loss(model: nn.Module) -> Tensor:
            return (model(x) - goal).square().mean() / size

        handle = attach(model, method, "0", seed=self.seed)
        try:
            train(handle, loss, num_steps, lr, kind)
        except torch.linalg.LinAlgError:
            return math.inf
        with torch.no_grad():
            final = float(loss(model))
        return final if math.isfinite(final) else math.inf

    @staticmethod
    def floor(rank: int) -> float:
        """Return the error of the best update of a rank."""
        squares = [1 / i for i in range(1, 97)]
        return sum(squares[rank:]) / sum(squares)
