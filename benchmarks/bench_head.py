"""Time and memory of a frozen head with its loss, forward and backward to the hidden states.

Three ways take turns on the same numbers, and ratios are taken within a turn: torch's cross-entropy of the logits in
fp32, as most libraries compute it; the cross-entropy in pieces on whole logits; and the loss of the frozen head, which
never holds them (``lorakit/kernels/head_loss.py``). Beside them the two products alone, which no way can beat. Memory
is what tensors take at the peak above what was given. The losses are printed, so that nobody wins by computing another.

    OMP_NUM_THREADS=1 python benchmarks/bench_head.py [--words 8192 32768] [--device cuda] [--turns 5] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.kernels.head_loss import head_loss
from lorakit.training.memory import peak_bytes
from lorakit.training.tasks.cross_entropy import summed_cross_entropy

WAYS = ("torch", "pieces", "frozen head", "two products")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ways(count: int, width: int, words: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return the steps on one set of random numbers; all but the products alone return the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(count, width).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(words, width) * width**-0.5).to(dtype).to(device)
    labels = torch.randint(words, (count,)).to(device)

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden.grad = None
            found = loss()
            found.backward()
            return found.detach()

        return run

    def products() -> Tensor:
        return torch.mm(torch.mm(hidden.detach(), weight.t()), weight)

    return {
        "torch": step(lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")),
        "pieces": step(lambda: summed_cross_entropy(F.linear(hidden, weight), labels)),
        "frozen head": step(lambda: head_loss(hidden, weight, None, labels)),
        "two products": products,
    }


def measured(case: dict[str, Any], dtype: str, device: str, turns: int) -> dict[str, Any]:
    """Return seconds of each turn, peak bytes and losses by way."""
    steps = ways(**case, dtype=DTYPES[dtype], device=device)
    place = torch.device(device)
    peaks = {way: peak_bytes(step, place) for way, step in steps.items()}  # warms up as well
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    losses = {}
    for turn in range(turns):
        for way in sorted(steps, key=lambda way: (WAYS.index(way) + turn) % len(WAYS)):
            _wait(place)
            begun = time.perf_counter()
            found = steps[way]()
            _wait(place)
            seconds[way].append(time.perf_counter() - begun)
            if way != "two products":
                losses[way] = found.item()
    return {**case, "dtype": dtype, "seconds": seconds, "peak_bytes": peaks, "losses": losses}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(found: dict[str, Any], way: str, other: str) -> tuple[float, float]:
    """Return the median over turns of ``way``'s time over ``other``'s, and half the range between the quartiles."""
    pairs = zip(found["seconds"][way], found["seconds"][other], strict=True)
    values = sorted(a / b for a, b in pairs)
    spread = values[(3 * len(values)) // 4] - values[len(values) // 4]
    return statistics.median(values), spread / 2


def row(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [f"{found['words']:>7,}", f"{found['width']:>5,}", f"{found['count']:>5,}", found["dtype"]]
    for other in ("torch", "pieces", "two products"):
        middle, spread = ratio(found, "frozen head", other)
        cells.append(f"{middle:.2f} +- {spread:.2f}")
    cells += [f"{found['peak_bytes'][way] / 2**20:>9,.1f}" for way in WAYS[:3]]
    first, last = found["losses"]["torch"], found["losses"]["frozen head"]
    return "| " + " | ".join([*cells, f"{abs(last - first) / abs(first):.0e}"]) + " |"


def main() -> None:
    """Print a table, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--width", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--count", type=int, nargs="+", default=[256, 512, 1024, 2048], help="supervised positions")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("Time of the frozen head's loss over the others', and the peak of each in MiB.\n")
        print("| words | width | positions | dtype | over torch | over pieces | over two products |", end="")
        print(" torch MiB | pieces MiB | frozen head MiB | losses differ |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
    for words, width, count, dtype in itertools.product(args.words, args.width, args.count, args.dtype):
        found = measured({"count": count, "width": width, "words": words}, dtype, args.device, args.turns)
        print(json.dumps(found) if args.json else row(found), flush=True)


if __name__ == "__main__":
    main()
