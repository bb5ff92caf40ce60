"""PiSSA and MiLoRA: the function is kept, the saved adapter is plain, and when the start helps."""

from __future__ import annotations

import functools
import time

import torch
from experiments.gate import Found, Gate
from experiments.weights import Tuned, after_saving, at_the_start, method
from torch import Tensor, nn

import lorakit as lk
from lorakit.inits.pissa import PiSSA
from lorakit.inits.svd import all_directions, balanced, top_directions
from lorakit.methods.lora import LowRankUpdate

PAPER = "Meng, Wang, Zhang 2024, arXiv 2404.02948"


def kept(seed: int, init: object) -> Found:
    fp32, bf16 = at_the_start(seed, init), at_the_start(seed, init, torch.bfloat16)
    return Found(max(fp32, bf16), {"fp32": fp32, "bf16 base": bf16})


def saved(seed: int, init: object) -> Found:
    difference, moved = after_saving(seed, init)
    return Found(difference, {"moved by training": moved})


def against_lora(seed: int, init: object, place: str, kind: str, num_steps: int) -> Found:
    change = Tuned(seed, place)
    (found, lr), (plain, plain_lr) = (change.best(method(each), kind, num_steps) for each in (init, "kaiming"))
    return Found(found / plain, {"missed": found, "plain LoRA": plain, "lr": lr, "LoRA's lr": plain_lr})


def fast(seed: int) -> Found:
    torch.manual_seed(seed)
    left, right = torch.linalg.qr(torch.randn(1024, 768)).Q, torch.linalg.qr(torch.randn(768, 768)).Q
    W = (left / torch.arange(1, 769).sqrt()) @ right.T
    began = time.perf_counter()
    A, B = balanced(all_directions(W).first(16), 2.0)
    between = time.perf_counter()
    A_4, B_4 = balanced(top_directions(W, 16, 4), 2.0)
    ended = time.perf_counter()
    error = float((B_4 @ A_4 - B @ A).norm() / (B @ A).norm())
    return Found(error, {"seconds": ended - between, "exact, seconds": between - began})


def small_steps(seed: int, lr: float = 2e-4, num_steps: int = 20) -> Found:
    """Take the same small steps of gradient descent in bf16 and in fp32, and compare the changes of the weight."""
    change = Tuned(seed, "top")
    wide, narrow = (_stepped(change, dtype, lr, num_steps) for dtype in (torch.float32, torch.bfloat16))
    reference = wide.norm()
    naive = _naive(change, lr, num_steps)
    return Found(
        float((narrow - wide).norm() / reference), {"B A - B0 A0 in bf16": float((naive - wide).norm() / reference)}
    )


def _stepped(change: Tuned, dtype: torch.dtype, lr: float, num_steps: int) -> Tensor:
    handle, x, goal = change.attached(method(PiSSA()))
    model = handle.detach()
    handle = lk.attach(model, method(PiSSA()), "0", dtype=dtype)
    optimizer = torch.optim.SGD(handle.parameters().values(), lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()
    return handle.delta("0").double()


def _naive(change: Tuned, lr: float, num_steps: int) -> Tensor:
    """Return the same with the factors themselves as parameters in bf16."""
    handle, x, goal = change.attached(method(PiSSA()))
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    assert update.A0 is not None
    assert update.B0 is not None
    A0, B0, W = update.A0.bfloat16(), update.B0.bfloat16(), handle.model.get_parameter("0.weight")
    A, B = (nn.Parameter(tensor.clone()) for tensor in (A0, B0))
    optimizer = torch.optim.SGD([A, B], lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        out = x @ W.T + update.scale * ((x @ A.float().T) @ B.float().T - (x @ A0.float().T) @ B0.float().T)
        (out - goal).square().mean().backward()
        optimizer.step()
    return update.scale * (B.double() @ A.double() - B0.double() @ A0.double()).detach()


GATES: list[Gate] = [
    *(
        Gate(
            name,
            f"Attaching with '{name}' changes no bit of a network's outputs, in fp32 and on a base in bf16.",
            "= 0 (the papers' code: <= 1e-4)",
            functools.partial(kept, init=name),
            lambda value: value == 0.0,
            source="derived",
        )
        for name in ("pissa", "milora")
    ),
    *(
        Gate(
            name,
            f"Saved after '{name}', a plain LoRA of twice the rank is the trained model on the untouched base.",
            "<= 1e-4",
            functools.partial(saved, init=name),
            lambda value: value <= 1e-4,
            source="derived",
        )
        for name in ("pissa", "milora")
    ),
    Gate(
        "pissa",
        "Four steps of the Krylov iteration give the exact start of a 1024 x 768 weight, rank 16.",
        "<= 1e-3 relative",
        fast,
        lambda value: value <= 1e-3,
        source="Musco, Musco 2015, arXiv 1504.05477",
    ),
    Gate(
        "pissa",
        "Small steps survive in bf16: the weight's change after 20 of them is that of fp32.",
        "<= 0.1 relative",
        small_steps,
        lambda value: value <= 0.1,
        source="derived",
    ),
    *(
        Gate(
            name,
            f"{shown} on {words}, {steps} steps of {label}, each at its best rate: what is missed, over plain LoRA's.",
            "reported",
            functools.partial(against_lora, init=name, place=place, kind=kind, num_steps=steps),
            None,
            source=PAPER if name == "pissa" else "Wang et al. 2024, arXiv 2406.09044",
        )
        for name, shown, place, words in (
            ("pissa", "PiSSA", "top", "a change inside the weight's first 8 directions"),
            ("pissa", "PiSSA", "anywhere", "a change unrelated to the weight"),
            ("milora", "MiLoRA", "minor", "a change inside the weight's last 8 directions"),
            ("milora", "MiLoRA", "anywhere", "a change unrelated to the weight"),
        )
        for kind, label, steps in (("sgd", "SGD", 40), ("adamw", "AdamW", 40))
    ),
]
