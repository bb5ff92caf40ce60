"""VeRA: its numbers, its reload from a seed, and the same numbers spent on LoRA of rank 1."""

from __future__ import annotations

import math
import tempfile

import torch
from experiments.gate import Found, Gate
from experiments.stepping import train
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.vera import draw

SOURCE = "Kopiczko et al. 2023, arXiv 2310.11454"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
D_IN, D_OUT = 48, 64


def stray_numbers(seed: int) -> Found:
    """Return how far the trained numbers of three layers are from the sum of ``d_out + rank``."""
    sizes, rank = [(48, 64), (64, 20), (20, 33)], 96 + seed
    model = nn.Sequential(*(nn.Linear(d_in, d_out) for d_in, d_out in sizes))
    handle = lk.attach(model, lk.VeRA(rank=rank), seed=seed)
    expected = sum(d_out + rank for _, d_out in sizes)
    lora = sum(d_out + d_in for d_in, d_out in sizes)
    return Found(abs(handle.counts().trained - expected), {"numbers": expected, "LoRA of rank 1": lora})


def reloaded_difference(seed: int) -> Found:
    """Return the largest difference of outputs after saving without A and B and loading again, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, 20))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x, goal = torch.randn(64, D_IN), torch.randn(64, 20)
        handle = lk.attach(model, lk.VeRA(rank=128, save_projection=False), seed=seed)
        train(handle, lambda model: (model(x) - goal).square().mean(), 10, 0.05)
        file = next(path for path in lk.save(handle, folder) if path.suffix == ".safetensors")
        other = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, 20))
        other.load_state_dict(base)
        lk.load(other, folder)
        with torch.no_grad():
            moved = float((model(x) - x.new_tensor(0)).abs().max())
            return Found(
                float((other(x) - model(x)).abs().max()),
                {"largest output": moved, "file in KiB": file.stat().st_size / 1024},
            )


def own_form(seed: int) -> Found:
    """Return VeRA's final error on ``diag(b) B diag(d) A`` of the very pair that it draws."""
    return _compared(seed, pair_seed=seed)


def form_of_another_pair(seed: int) -> Found:
    """Return the same where the target's pair is another than VeRA's."""
    return _compared(seed, pair_seed=seed + 1000)


def rank_one(seed: int) -> Found:
    """Return the same on an update of rank 1, LoRA's own form."""
    return _compared(seed, pair_seed=None)


def _compared(seed: int, pair_seed: int | None) -> Found:
    """Compare at as many numbers, each at its best rate: with rank ``d_in`` VeRA has LoRA's of rank 1."""
    methods: dict[str, lk.Method] = {"VeRA": lk.VeRA(rank=D_IN, projection_seed=seed), "LoRA": lk.LoRA(rank=1, alpha=2)}
    best = {name: min(_final(method, pair_seed, lr, seed) for lr in RATES) for name, method in methods.items()}
    return Found(best["VeRA"], {"LoRA": best["LoRA"]})


def _final(method: lk.Method, pair_seed: int | None, lr: float, seed: int) -> float:
    """Train towards W0 plus ``diag(b) B diag(d) A`` with random b and d, or plus one outer product.

    The error is relative to where training starts.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    x = torch.randn(256, D_IN)
    if pair_seed is None:
        change = torch.randn(D_OUT, 1) @ torch.randn(1, D_IN)
    else:
        pair = draw(D_IN, D_IN, D_OUT, pair_seed)
        change = (torch.randn(D_OUT, 1) * pair["B"]) @ (torch.randn(D_IN, 1) * pair["A"])
    change = change / torch.linalg.matrix_norm(change)
    start = model(x).detach()
    goal = start + x @ change.T
    size = (start - goal).square().mean()
    handle = lk.attach(model, method, "0", seed=seed)

    def loss(model: nn.Module) -> Tensor:
        return (model(x) - goal).square().mean() / size

    train(handle, loss, 400, lr)
    with torch.no_grad():
        final = float(loss(model))
    return final if math.isfinite(final) else math.inf


GATES = [
    Gate(
        "vera",
        "A layer trains d_out + rank numbers, whatever its inputs.",
        "off by 0 numbers",
        stray_numbers,
        lambda value: value == 0,
        source=SOURCE,
    ),
    Gate(
        "vera",
        "Saved without A and B, an adapter comes back from its seed with every bit of its outputs.",
        "largest difference 0",
        reloaded_difference,
        lambda value: value == 0,
        source="derived",
    ),
    *(
        Gate(
            "vera",
            f"VeRA's final loss (1 at the start) with LoRA's numbers of rank 1, each at its best rate, on {target}.",
            "reported",
            measure,
            None,
            source="derived",
        )
        for target, measure in (
            ("a planted diag(b) B diag(d) A of its own pair", own_form),
            ("one of another random pair", form_of_another_pair),
            ("a planted update of rank 1", rank_one),
        )
    ),
]
