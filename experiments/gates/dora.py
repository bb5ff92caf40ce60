"""DoRA: a change of the rows' magnitudes alone, which LoRA of the same rank cannot fit; and its norm."""

from __future__ import annotations

import math

import torch
from experiments.gate import Found, Gate
from experiments.stepping import relative, train
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.dora import DoRAUpdate

SOURCE = "Liu et al. 2024, arXiv 2402.09353"
RATES = (0.003, 0.01, 0.03, 0.1)


def rescaled_rows(seed: int) -> Found:
    """Return DoRA's final error over LoRA's, both of rank 1 and each at its best rate, on rescaled rows of W0."""
    methods: dict[str, lk.Method] = {"DoRA": lk.DoRA(rank=1, alpha=2), "LoRA": lk.LoRA(rank=1, alpha=2)}
    best = {name: min(_final(method, lr, seed) for lr in RATES) for name, method in methods.items()}
    return Found(best["DoRA"] / best["LoRA"], {f"relative error of {name}": error for name, error in best.items()})


def _final(method: lk.Method, lr: float, seed: int) -> float:
    """Train on ``y = diag(m) W0 x`` with m between 0.5 and 1.5; the error is relative to where training starts."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 64, bias=False))
    x = torch.randn(128, 48)
    start = model(x).detach()
    goal = (0.5 + torch.rand(64)) * start
    size = (start - goal).square().mean()
    handle = lk.attach(model, method, "0", seed=seed)

    def loss(model: nn.Module) -> Tensor:
        return (model(x) - goal).square().mean() / size

    train(handle, loss, 300, lr)
    with torch.no_grad():
        final = float(loss(model))
    return final if math.isfinite(final) else math.inf


def norm_without_a_dense_matrix(seed: int) -> Found:
    """Return the error of the rows' norms, which are found from the factors, against the dense matrix's in fp64."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 384))
    handle = lk.attach(model, lk.DoRA(rank=16, alpha=24), "0", seed=seed)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    update = handle.updates()["0"]
    assert isinstance(update, DoRAUpdate)
    A, B = update.factors()
    W = model[0].weight.detach()
    dense = torch.linalg.vector_norm(W.double() + update.scale * B.detach().double() @ A.detach().double(), dim=1)
    return Found(relative(update.norm(W, A, B).double(), dense))


GATES = [
    Gate(
        "dora",
        "Rows of W0 rescaled: DoRA of rank 1 ends far below LoRA of rank 1, each at the best of four rates.",
        "final loss <= 0.1 of LoRA's",
        rescaled_rows,
        lambda value: value <= 0.1,
        source=SOURCE,
    ),
    Gate(
        "dora",
        "The norm of W0 + s B A by rows, found without that matrix, is the dense one.",
        "relative error <= 1e-6",
        norm_without_a_dense_matrix,
        lambda value: value <= 1e-6,
        source="derived",
    ),
]
