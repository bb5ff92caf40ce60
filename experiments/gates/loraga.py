"""LoRA-GA: the first step is the gradient's best approximation of rank 2r; what that is worth depends on gamma."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable

from experiments.gate import Found, Gate
from experiments.starts import EVERY_ROW, Change, first_step

from lorakit.inits.loraga import LoRAGA
from lorakit.methods.lora import LoRA

RANK, ALPHA = 8, 16.0
PAPER = "Wang, Yu, Li 2024, arXiv 2407.05000, section 3"


def method(init: object = "kaiming") -> LoRA:
    return LoRA(rank=RANK, alpha=ALPHA, scaling="rslora", init=init)


def first_step_at(seed: int, power: float) -> Found:
    change = Change(seed, power)
    bound = change.reachable(2 * RANK)
    plain, found = first_step(change, method()), first_step(change, method(LoRAGA(rows=EVERY_ROW)))
    return Found(found / bound, {"cosine": found, "plain LoRA": plain, "bound": bound})


def against_plain(seed: int) -> Found:
    change = Change(seed)
    plain, found = first_step(change, method()), first_step(change, method(LoRAGA(rows=EVERY_ROW)))
    return Found(found / plain, {"cosine": found, "plain LoRA": plain})


def missed(seed: int, kind: str, num_steps: int, rows: int) -> Found:
    change = Change(seed)
    quiet = logging.getLogger("lorakit.inits.loraga")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # a gamma that is too small is what is shown here
    try:
        gammas = {
            f"gamma {gamma}": change.best(method(LoRAGA(rows=rows, gamma=float(gamma))), kind, num_steps)
            for gamma in (16, 64, 256, 1024)
        }
    finally:
        quiet.setLevel(level)
    found, plain = change.best(method(LoRAGA(rows=rows)), kind, num_steps), change.best(method(), kind, num_steps)
    return Found(found / plain, {"missed": found, "plain LoRA": plain, **gammas, "floor": change.floor(RANK)})


def _step(power: float, words: str) -> Gate:
    measure: Callable[[int], Found] = functools.partial(first_step_at, power=power)
    return Gate(
        "loraga",
        f"The first step's cosine with the negative gradient is the largest that rank 2r allows ({words}).",
        ">= 0.99 of the bound",
        measure,
        lambda value: value >= 0.99,
        source=PAPER,
    )


GATES: list[Gate] = [
    _step(1.0, "singular values 1/i"),
    _step(0.5, "singular values 1/sqrt(i)"),
    _step(0.0, "a gaussian change"),
    Gate(
        "loraga",
        "The first step's cosine is several times that of plain LoRA (singular values 1/i).",
        ">= 2.5",
        against_plain,
        lambda value: value >= 2.5,
        source=PAPER,
    ),
    *(
        Gate(
            "loraga",
            f"After 30 steps of {words}, each at its best rate, it misses less of a planted change than plain LoRA.",
            f"<= {share} of LoRA's",
            functools.partial(missed, kind=kind, num_steps=30, rows=EVERY_ROW),
            functools.partial(operator.ge, share),
            source="derived",
        )
        for kind, words, share in (("sgd", "SGD", 0.8), ("adamw", "AdamW", 0.9))
    ),
    Gate(
        "loraga",
        "After 30 steps of SGD, from a quarter of the rows' gradient, to which a small gamma holds it.",
        "reported",
        functools.partial(missed, kind="sgd", num_steps=30, rows=1),
        None,
        source="derived",
    ),
]
