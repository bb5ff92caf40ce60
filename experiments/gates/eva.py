"""EVA: the pair reads the inputs' principal components, and ranks go where the inputs have them."""

from __future__ import annotations

import functools

import torch
from experiments.gate import Found, Gate
from torch import Tensor, nn

from lorakit.adapters import Handle, attach
from lorakit.inits import Calibration
from lorakit.inits.eva import EVA
from lorakit.methods.lora import LoRA

RANK, ALPHA = 8, 20.0
WIDTH, ROWS, POSITIONS, BATCH = 128, 64, 12, 8
PAPER = "Paischer et al. 2024, arXiv 2410.07170"


class Two(nn.Module):
    """Two layers of unlike shapes, each with inputs of its own."""

    def __init__(self, widths: tuple[int, int], outputs: tuple[int, int]) -> None:
        super().__init__()
        self.widths = widths
        self.first, self.second = (nn.Linear(*shape) for shape in zip(widths, outputs, strict=True))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return both layers' outputs beside each other."""
        first, second = x.split(self.widths, dim=-1)
        return torch.cat([self.first(first), self.second(second)], dim=-1)


def inputs(width: int, power: float) -> Tensor:
    """Return inputs with a mean of their own and standard deviations ``i^-power`` along random directions."""
    directions = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(ROWS, POSITIONS, width) * torch.arange(1, width + 1) ** -power @ directions + torch.randn(width)


def calibration(x: Tensor) -> tuple[Calibration, Tensor]:
    """Return the rows in batches, some of their positions padding that holds large numbers, and the mask."""
    mask = torch.arange(POSITIONS)[None] < torch.randint(POSITIONS // 2, POSITIONS + 1, (ROWS, 1))
    padded = torch.where(mask[..., None], x, 50.0)
    pairs = zip(padded.split(BATCH), mask.long().split(BATCH), strict=True)
    return Calibration([{"x": rows, "attention_mask": own} for rows, own in pairs]), mask


def explained(x: Tensor, A: Tensor) -> float:
    """Return the share of the variance of rows in the span of A's rows."""
    centred = (x - x.mean(dim=0)).double()
    Q = torch.linalg.qr(A.double().T).Q
    return float((centred @ Q).square().sum() / centred.square().sum())


def variance(seed: int, power: float) -> Found:
    torch.manual_seed(seed)
    model = Two((WIDTH, 96), (40, 150))
    x = torch.cat([inputs(WIDTH, power), inputs(96, power)], dim=-1)
    examples, mask = calibration(x)
    handle = attach(model, LoRA(rank=RANK, alpha=ALPHA, init=EVA()), ["first", "second"], calibration=examples)
    shares, found = [], {}
    for name, part in zip(("first", "second"), x[mask].split((WIDTH, 96), dim=-1), strict=True):
        exact = torch.linalg.svd((part - part.mean(dim=0)).double(), full_matrices=False).Vh[:RANK]
        own, best = explained(part, handle.parameters()[f"{name}.A"].detach()), explained(part, exact)
        random = explained(part, torch.randn(RANK, part.shape[1]))
        shares.append(own / best)
        found |= {f"{name}: explained": own, f"{name}: exact": best, f"{name}: random": random}
    return Found(min(shares), found)


def redistributed(seed: int) -> tuple[Handle, int]:
    """Return an adapter with ranks by inputs: isotropic ones at the first layer, of rank 4 at the second."""
    torch.manual_seed(seed)
    even, width, out = 3, 60, 44
    model = Two((width, width), (out, out))
    x = torch.cat([torch.randn(ROWS, POSITIONS, width), torch.randn(ROWS, POSITIONS, 4) @ torch.randn(4, width)], -1)
    method = LoRA(rank="auto", budget=2 * even * (width + out), rank_by="inputs", alpha=ALPHA)
    return attach(model, method, ["first", "second"], calibration=calibration(x)[0]), 2 * even


def sum_of_ranks(seed: int) -> Found:
    handle, total = redistributed(seed)
    found = sum(update.A.shape[0] for update in handle.updates().values())
    return Found(float(found - total), {"sum": float(found), "even ranks together": float(total)})


def isotropic_against_rank_4(seed: int) -> Found:
    ranks = {path: update.A.shape[0] for path, update in redistributed(seed)[0].updates().items()}
    isotropic, four = float(ranks.get("first", 0)), float(ranks.get("second", 0))
    return Found(isotropic - four, {"isotropic": isotropic, "of rank 4": four})


GATES: list[Gate] = [
    *(
        Gate(
            "eva",
            f"A explains as much of the inputs' variance as an exact PCA, through padding ({words}).",
            ">= 0.95 of the exact share",
            functools.partial(variance, power=power),
            lambda value: value >= 0.95,
            source=PAPER,
        )
        for power, words in ((1.0, "deviations 1/i"), (0.5, "deviations 1/sqrt(i)"), (0.0, "isotropic inputs"))
    ),
    Gate(
        "eva",
        "Ranks by explained variance sum to those of the even budget.",
        "0 of difference",
        sum_of_ranks,
        lambda value: value == 0.0,
        source=PAPER,
    ),
    Gate(
        "eva",
        "A layer with isotropic inputs gets fewer ranks than one whose inputs have rank 4.",
        "< 0 (difference)",
        isotropic_against_rank_4,
        lambda value: value < 0.0,
        source=PAPER,
    ),
]
