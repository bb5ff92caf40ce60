"""OLoRA: the pair is a part of the weight for any alpha, and the function is kept."""

from __future__ import annotations

import functools

import torch
from experiments.gate import Found, Gate
from experiments.gates.pissa import against_lora, kept, saved
from experiments.weights import Tuned, method

from lorakit.methods.lora import LowRankUpdate

PAPER = "Büyükakyüz 2024, arXiv 2406.01775"


def a_part_of_the_weight(seed: int) -> Found:
    """Compare ``s B0 A0`` with the first columns of Q times the first rows of R of torch's decomposition."""
    handle, _, _ = Tuned(seed).attached(method("olora"))
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    assert update.A0 is not None
    assert update.B0 is not None
    Q, R = torch.linalg.qr(handle.model.get_parameter("0.weight").detach().double())
    rank = update.A0.shape[0]
    expected = Q[:, :rank] @ R[:rank]
    found = update.scale * update.B0.double() @ update.A0.double()
    gram = update.scale * update.B0.double().T @ update.B0.double() - torch.eye(rank)
    return Found(float((found - expected).norm() / expected.norm()), {"|s B^T B - I|": float(gram.abs().max())})


GATES: list[Gate] = [
    Gate(
        "olora",
        "Attaching changes no bit of a network's outputs, in fp32 and on a base in bf16.",
        "= 0 (the paper's code: <= 1e-4)",
        functools.partial(kept, init="olora"),
        lambda value: value == 0.0,
        source="derived",
    ),
    Gate(
        "olora",
        "The saved adapter, a plain LoRA of twice the rank, is the trained model on the untouched base.",
        "<= 1e-4",
        functools.partial(saved, init="olora"),
        lambda value: value <= 1e-4,
        source="derived",
    ),
    Gate(
        "olora",
        "What is taken off the weight is its own part Q_r R_r at alpha / rank = 2, and B is orthogonal.",
        "<= 1e-5 relative",
        a_part_of_the_weight,
        lambda value: value <= 1e-5,
        source=PAPER,
    ),
    *(
        Gate(
            "olora",
            f"{words}, 40 steps of {label}, each at its best rate; what is missed, over plain LoRA's.",
            "reported",
            functools.partial(against_lora, init="olora", place=place, kind=kind, num_steps=40),
            None,
            source=PAPER,
        )
        for place, words in (
            ("top", "A change inside the weight's first 8 directions"),
            ("anywhere", "A change unrelated to the weight"),
        )
        for kind, label in (("sgd", "SGD"), ("adamw", "AdamW"))
    ),
]
