"""LoRA-Pro: its step is the nearest to the weight's gradient that a pair can take, and its memory is LoRA's."""

from __future__ import annotations

import functools

import torch
from experiments.gate import Found, Gate
from experiments.stepping import Loss, Planted, gradients, projection, relative, train, weight_gradient
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.lora import LowRankUpdate
from lorakit.training.optimizers import optimizer_for

SOURCE = "Wang et al. 2024, arXiv 2407.18242"
RANK, ALPHA = 4, 10.0
STEPS = 40
RATES = {"sgd": tuple(10 ** (i / 2 - 3) for i in range(9)), "adamw": tuple(1e-4 * 10 ** (i / 3) for i in range(9))}


def _trained(method: str, seed: int) -> tuple[lk.Handle, Loss]:
    """Return a model some steps into training, with the adapter on a layer of 56 x 40."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 56), nn.Tanh(), nn.Linear(56, 12))
    x, goal = torch.randn(64, 40), torch.randn(64, 12)

    def loss(model: nn.Module) -> Tensor:
        return (model(x) - goal).square().mean()

    handle = lk.attach(model, {"name": method, "rank": RANK, "alpha": ALPHA}, "0", seed=seed)
    train(handle, loss, 5, 1e-2)
    return handle, loss


def _change(update: object) -> Tensor:
    """Return ``s (B g^A + g^B A)``, the change of the weight for a step along the gradients, in fp64."""
    assert isinstance(update, LowRankUpdate)
    assert update.A.grad is not None
    assert update.B.grad is not None
    A, B = update.A.detach().double(), update.B.detach().double()
    return update.scale * (B @ update.A.grad.double() + update.B.grad.double() @ A)


def _steps(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return G, the best step of a pair, LoRA-Pro's, and LoRA's, at the same factors."""
    handle, loss = _trained("lorapro", seed)
    G = weight_gradient(handle, "0", loss)
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    P_A, P_B = projection(update.A.mT), projection(update.B)
    best = P_B @ G + (G - P_B @ G) @ P_A
    gradients(handle, loss)
    plain = _change(update)
    handle.entry("default").method.rule(handle.updates(), 10).before_step(6)
    return G, best, _change(update), plain


def distance_from_the_projection(seed: int) -> Found:
    """Return the relative distance of LoRA-Pro's step from the best one."""
    _, best, found, plain = _steps(seed)
    return Found(relative(found, best), {"LoRA": relative(plain, best)})


def gained_cosine(seed: int) -> Found:
    """Return by how much the cosine to the weight's gradient is larger than LoRA's."""
    G, _, found, plain = _steps(seed)
    cosines = {"LoRA-Pro": _cosine(found, G), "LoRA": _cosine(plain, G)}
    return Found(cosines["LoRA-Pro"] - cosines["LoRA"], cosines)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def optimizer_numbers(seed: int) -> Found:
    """Return the numbers in AdamW's state after a step, in units of ``2 rank (d_in + d_out)``."""
    handle, loss = _trained("lorapro", seed)
    rule = handle.entry("default").method.rule(handle.updates(), 1)
    optimizer = optimizer_for(rule, handle.parameters(), "adamw", 1e-3, 0.0)
    gradients(handle, loss)
    rule.before_step(1)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    remembered = sum(value.numel() for value in rule.state().values())
    unit = 2 * RANK * (40 + 56)
    return Found((sum(v.numel() for v in held) + remembered) / unit, {"full fine-tuning": 2 * 40 * 56 / unit})


def best_error(optimizer: str, seed: int) -> Found:
    """Return LoRA-Pro's best final error in units of LoRA's, each at the best of the same rates."""
    planted = Planted(seed)
    methods = {"LoRA": lk.LoRA(rank=16, alpha=24), "LoRA-Pro": lk.LoRAPro(rank=16, alpha=24)}
    best = {
        name: min(planted.error(method, lr, STEPS, optimizer) for lr in RATES[optimizer])
        for name, method in methods.items()
    }
    beside = {f"error of {name}": error for name, error in best.items()}
    return Found(best["LoRA-Pro"] / best["LoRA"], {**beside, "no update of this rank is below": planted.floor(16)})


def _reported(optimizer: str) -> Gate:
    return Gate(
        "lorapro",
        f"Best final error with {optimizer} in units of LoRA's, each at the best of {len(RATES[optimizer])} rates "
        f"(planted change, {STEPS} steps, no clipping).",
        "reported",
        functools.partial(best_error, optimizer),
        None,
        source=SOURCE,
    )


GATES = [
    Gate(
        "lorapro",
        "The step s (B g^A + g^B A) is P_B G + (I - P_B) G P_A (five steps into a run).",
        "relative distance <= 1e-5",
        distance_from_the_projection,
        lambda value: value <= 1e-5,
        source=SOURCE,
    ),
    Gate(
        "lorapro",
        "Its cosine to the weight's gradient is no smaller than LoRA's at the same factors.",
        "gain >= 0",
        gained_cosine,
        lambda value: value >= 0,
        source=SOURCE,
    ),
    Gate(
        "lorapro",
        "AdamW remembers two numbers for each of rank (d_in + d_out), and the method none.",
        "= 1 in units of 2 rank (d_in + d_out)",
        optimizer_numbers,
        lambda value: value == 1,
        source="derived",
    ),
    _reported("sgd"),
    _reported("adamw"),
]
