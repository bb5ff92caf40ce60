"""LoRA+: two rates; what they are, and an honest comparison with LoRA at its best rate."""

from __future__ import annotations

import torch
from experiments.gate import Found, Gate
from experiments.stepping import Loss, Planted, train
from torch import Tensor, nn

import lorakit as lk

RATIO = 16.0
SOURCE = "Hayou et al. 2024, arXiv 2402.12354"
RATES = tuple(1e-4 * 10 ** (i / 3) for i in range(9))
RATIOS = (1.0, 4.0, 16.0)
RANK, STEPS = 16, 40


class Model(nn.Module):
    """Tokens to scores: an embedding, a layer, a norm and a head, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores."""
        return self.head(self.norm(torch.tanh(self.up(self.embed(tokens)))))


def _attached(method: lk.LoRA, seed: int) -> tuple[lk.Handle, Loss]:
    torch.manual_seed(seed)
    model = Model()
    tokens, goal = torch.randint(0, 17, (8, 6)), torch.randn(8, 6, 5)
    handle = lk.attach(model, method, ["embed", "up"], train_modules=["norm", "head"], seed=seed)
    return handle, lambda model: (model(tokens) - goal).square().mean()


def wrong_rates(seed: int) -> Found:
    """Count parameters whose group has another rate than their name asks for."""
    handle, _ = _attached(lk.LoRAPlus(rank=3, alpha=5, ratio=RATIO, bias="lora_only"), seed)
    lr = 3e-4
    named = handle.parameters()
    groups = handle.entry("default").method.rule(handle.updates(), 10).groups(named, lr)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    faster = {"embed.A", "up.B"}
    wrong = [name for name, p in named.items() if rates[id(p)] != (RATIO * lr if name in faster else lr)]
    return Found(len(wrong), {"parameters": len(named), "at the faster rate": len(faster & named.keys())})


def difference_from_lora(seed: int) -> Found:
    """Return the largest difference to LoRA's parameters after 20 steps with the ratio 1."""
    found = []
    for method in (lk.LoRA(rank=3, alpha=5), lk.LoRAPlus(rank=3, alpha=5, ratio=1)):
        handle, loss = _attached(method, seed)
        train(handle, loss, 20, 1e-2)
        found.append({name: parameter.detach() for name, parameter in handle.parameters().items()})
    plain, plus = found
    return Found(max(float((plain[name] - plus[name]).abs().max()) for name in plain))


def first_step(seed: int) -> Found:
    """Return how many times as far as LoRA's the factors that start at zero move in the first step of AdamW."""
    moved = []
    for method in (lk.LoRA(rank=3, alpha=5), lk.LoRAPlus(rank=3, alpha=5, ratio=RATIO)):
        handle, loss = _attached(method, seed)
        train(handle, loss, 1, 1e-3)
        moved.append([handle.parameters()[name].detach().norm() for name in ("embed.A", "up.B")])
    each = [float(plus / plain) for plain, plus in zip(*moved, strict=True)]
    return Found(max(each, key=lambda ratio: abs(ratio - RATIO)), {"embedding's A": each[0], "layer's B": each[1]})


def best_error(seed: int) -> Found:
    """Return LoRA+'s best final error in units of LoRA's, each at the best of the same rates of A."""
    planted = Planted(seed)
    best = {}
    for ratio in RATIOS:
        method = lk.LoRAPlus(rank=RANK, alpha=24, ratio=ratio)
        best[ratio] = min(planted.error(method, lr, STEPS) for lr in RATES)
    beside = {f"error at ratio {ratio:g}": error for ratio, error in best.items()}
    beside["no update of this rank is below"] = planted.floor(RANK)
    return Found(min(best[ratio] for ratio in RATIOS if ratio > 1) / best[1.0], beside)


GATES = [
    Gate(
        "loraplus",
        "B has ratio times A's rate (an embedding's A has it); biases, norms and heads stay at the base rate.",
        "no parameter at another rate",
        wrong_rates,
        lambda value: value == 0,
        source=SOURCE,
    ),
    Gate(
        "loraplus",
        "With ratio 1 it is LoRA: no number differs after 20 steps.",
        "largest difference = 0",
        difference_from_lora,
        lambda value: value == 0,
        source="derived",
    ),
    Gate(
        "loraplus",
        "In the first step the factor that starts at zero moves 16 times as far as LoRA's.",
        "within 1e-4 of 16",
        first_step,
        lambda value: abs(value - RATIO) <= 1e-4 * RATIO,
        source="derived",
    ),
    Gate(
        "loraplus",
        f"Best final error of ratios 4 and 16 in units of LoRA's, each at the best of {len(RATES)} rates of A "
        f"(planted change, {STEPS} steps of AdamW).",
        "reported",
        best_error,
        None,
        source=SOURCE,
    ),
]
