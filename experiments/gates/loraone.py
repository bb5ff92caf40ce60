"""LoRA-One: the start is a step of gradient descent, and the steps after it go on from there."""

from __future__ import annotations

import functools

import torch
from experiments.gate import Found, Gate
from experiments.starts import EVERY_ROW, Change

from lorakit.inits.loraone import LoRAOne
from lorakit.methods.lora import LoRA

RANK, ALPHA = 8, 16.0
PAPER = "Zhang, Liu, Chen 2025, arXiv 2502.01235"


def method(init: object = "kaiming") -> LoRA:
    return LoRA(rank=RANK, alpha=ALPHA, scaling="rslora", init=init)


def at_the_start(seed: int) -> Found:
    change = Change(seed)
    handle, x, goal = change.attached(method(LoRAOne(rows=EVERY_ROW)))
    with torch.no_grad():
        found = float(change.loss(handle.model, x, goal))
        with handle.disabled():
            base = float(change.loss(handle.model, x, goal))
    return Found(found / base, {"at the start": found, "base": base})


def missed(seed: int, kind: str, num_steps: int) -> Found:
    change = Change(seed)
    found, plain = change.best(method(LoRAOne(rows=EVERY_ROW)), kind, num_steps), change.best(method(), kind, num_steps)
    return Found(found / plain, {"missed": found, "plain LoRA": plain, "floor": change.floor(RANK)})


GATES: list[Gate] = [
    Gate(
        "loraone",
        "The start itself is a step down: the loss is below the base's before the first step.",
        "< 1 times the base's loss",
        at_the_start,
        lambda value: value < 1.0,
        source=PAPER,
    ),
    Gate(
        "loraone",
        "After 15 steps of SGD, each at its best rate, it misses less of a planted change than plain LoRA.",
        "<= 0.8 of LoRA's",
        functools.partial(missed, kind="sgd", num_steps=15),
        lambda value: value <= 0.8,
        source=PAPER,
    ),
    Gate(
        "loraone",
        "After 15 steps of AdamW, each at its best rate, it misses less of a planted change than plain LoRA.",
        "<= 0.8 of LoRA's",
        functools.partial(missed, kind="adamw", num_steps=15),
        lambda value: value <= 0.8,
        source=PAPER,
    ),
    Gate(
        "loraone",
        "After 60 steps of SGD, plain LoRA has still not come as far.",
        "<= 0.8 of LoRA's",
        functools.partial(missed, kind="sgd", num_steps=60),
        lambda value: value <= 0.8,
        source="derived",
    ),
    Gate(
        "loraone",
        "After 60 steps of AdamW, both are near the least that rank r can miss: the lead is one of time.",
        "reported",
        functools.partial(missed, kind="adamw", num_steps=60),
        None,
        source="derived",
    ),
]
