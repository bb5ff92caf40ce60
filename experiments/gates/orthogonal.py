"""The orthogonal start: both factors learn from the first step, evenly, and the function is kept."""

from __future__ import annotations

import functools

import torch
from experiments.gate import Found, Gate
from experiments.gates.pissa import against_lora, kept
from experiments.stepping import gradients, relative, weight_gradient
from experiments.weights import Tuned, method
from torch import Tensor, nn

NOTE = "Datta 2024, datta0.github.io/posts/rethink-lora-init"


def first_step(seed: int, lr: float = 1e-5) -> Found:
    """Compare the weight's first change by gradient descent with the projections of its gradient."""
    handle, x, goal = Tuned(seed).attached(method("orthogonal"))

    def loss(model: nn.Module) -> Tensor:
        return (model(x) - goal).square().mean()

    G = weight_gradient(handle, "0", loss)
    scale = handle.entry("default").method.scale_at("0")
    A, B = (handle.parameters()[f"0.{name}"].detach().double() for name in "AB")
    expected = -lr * scale**2 * (G @ A.T @ A + B @ B.T @ G)
    share = [float(each.norm() / G.norm()) for each in (3 * G @ A.T @ A, 3 * B @ B.T @ G)]
    gradients(handle, loss)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            assert parameter.grad is not None
            parameter -= lr * parameter.grad
    found = relative(handle.delta("0").double(), expected)
    return Found(found, {"gradient's share by inputs": share[0], "by outputs": share[1]})


def both_live(seed: int) -> Found:
    """Return the smaller of the two factors' gradients over the larger, at the start."""

    def of(init: str) -> float:
        handle, x, goal = Tuned(seed).attached(method(init))
        gradients(handle, lambda model: (model(x) - goal).square().mean())
        norms = [float(p.grad.norm()) for p in handle.parameters().values() if p.grad is not None]
        return min(norms) / max(norms)

    return Found(of("orthogonal"), {"plain LoRA": of("kaiming")})


GATES: list[Gate] = [
    Gate(
        "orthogonal",
        "Attaching changes no bit of a network's outputs, in fp32 and on a base in bf16, and the file has rank r.",
        "= 0",
        functools.partial(kept, init="orthogonal"),
        lambda value: value == 0.0,
        source="derived",
    ),
    Gate(
        "orthogonal",
        "The first step of gradient descent projects the gradient on both sides: -lr s^2 (G A^T A + B B^T G).",
        "<= 1e-3 relative",
        first_step,
        lambda value: value <= 1e-3,
        source=NOTE,
    ),
    Gate(
        "orthogonal",
        "Both factors have gradients of one size at the start; plain LoRA's A has none.",
        ">= 0.5",
        both_live,
        lambda value: value >= 0.5,
        source=NOTE,
    ),
    *(
        Gate(
            "orthogonal",
            f"{words}, 40 steps of {label}, each at its best rate; what is missed, over plain LoRA's.",
            "reported",
            functools.partial(against_lora, init="orthogonal", place=place, kind=kind, num_steps=40),
            None,
            source=NOTE,
        )
        for place, words in (
            ("top", "A change inside the weight's first 8 directions"),
            ("anywhere", "A change unrelated to the weight"),
        )
        for kind, label in (("sgd", "SGD"), ("adamw", "AdamW"))
    ),
]
