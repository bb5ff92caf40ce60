"""Fit what each way of a routed product costs to measured times, and write the table that ships with the package.

Single products over a grid of sizes, all ways in turns, the least of several times (of one CPU thread its own time, so
that a busy machine does not count). For each way the five coefficients of ``lorakit/kernels/cost_table.py`` that are
not negative and leave the least relative error. A third of the sizes is left out of the fit: printed is how much
slower the chosen way is there than the best one (regret).

    OMP_NUM_THREADS=1 python benchmarks/make_cost_table.py [--device cpu] [--dry] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lorakit.files import write_text
from lorakit.kernels.cost_table import Problem, predicted_us
from lorakit.kernels.routed import WAYS, Pairs, Way
from lorakit.kernels.routed_product import add_products, add_trained
from lorakit.kernels.segments import Segments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = [(512, 512), (512, 1376), (1376, 512), (1024, 1024), (2048, 512)]
# Of a device type that was never measured: what a GPU's launches, products and memory cost to an order of magnitude.
NOMINAL = {"calls_us": 8.0, "us_per_mega_product": 0.04, "us_per_mb": 0.6}

Measured = list[tuple[Problem, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One routed product: rows, groups, ranks, widths, and how the rows lie."""

    rows: int
    groups: int
    rank: int
    widths: tuple[int, int]
    layout: str  # 'sorted', 'mixed', 'partly' (a third of the rows is the base's), 'uneven'
    mixed_ranks: bool

    def segments(self, device: str) -> Segments:
        """Return the rows' groups."""
        draw = random.Random(repr(self))
        codes = [i * self.groups // self.rows for i in range(self.rows)]
        if self.layout == "uneven":
            codes = sorted(
                [*range(self.groups), *(int(self.groups * draw.random() ** 3) for _ in codes[self.groups :])]
            )
        if self.layout == "partly":
            spare = [i for i in range(1, self.rows) if codes[i] == codes[i - 1]]
            for i in draw.sample(spare, min(len(spare), self.rows // 3)):
                codes[i] = -1
        if self.layout != "sorted":
            draw.shuffle(codes)
        return Segments(torch.tensor(codes), self.groups, device)

    def ranks(self) -> list[int]:
        """Return each group's rank."""
        return [self.rank * (1 + group % 2) if self.mixed_ranks else self.rank for group in range(self.groups)]


def cases(full: bool) -> Iterator[Case]:
    """Yield the grid of sizes; every case has at least one row for each group."""
    draw = random.Random(0)
    rows = (1, 4, 8, 16, 64, 256, 1024) if full else (4, 16, 64, 256)
    grid = itertools.product(rows, (1, 2, 4, 8, 16, 64, 256), (4, 8, 16, 64))
    for num, groups, rank in grid:
        if groups > num or num * groups * rank > 2**18:
            continue
        layout = draw.choice(["sorted", "mixed", "mixed", "partly", "uneven"])
        yield Case(num, groups, rank, draw.choice(WIDTHS), layout, draw.random() < 0.25)


def measure(case: Case, device: str, dtype: torch.dtype, trained: bool, budget_s: float) -> dict[str, float]:
    """Return the least time of each way, in microseconds; they take turns."""
    segments, ranks = case.segments(device), case.ranks()
    d_in, d_out = case.widths
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    A = [make(rank, d_in) for rank in ranks]
    B = [make(d_out, rank) for rank in ranks]
    x, out = make(case.rows, d_in), make(case.rows, d_out)
    pairs = Pairs(A, B, [2.0] * case.groups, dtype)
    ways = [way for way in WAYS.values() if way.takes(pairs, segments, trained)]
    for factor in (*A, *B, x):
        factor.requires_grad_(trained)
    runs = {way.name: runner(way, out, x, A, B, pairs, segments, trained) for way in ways}
    return least_times(runs, device, budget_s)


def measure_all(args: argparse.Namespace, dtype: torch.dtype, trained: bool) -> Measured:
    """Return the times of every size; with ``--times`` they are kept there, and read where they are."""
    kept = args.times and Path(args.times, f"{args.device}-{dtype}-{trained}.json")
    if kept and kept.exists():
        return [(Problem(**sizes), times) for sizes, times in json.loads(kept.read_text(encoding="utf-8"))]
    measured: Measured = []
    for case in cases(not args.quick):
        pairs = Pairs(
            [torch.empty(rank, case.widths[0]) for rank in case.ranks()],
            [torch.empty(case.widths[1], rank) for rank in case.ranks()],
            [1.0] * case.groups,
            dtype,
        )
        problem = Problem.of(pairs, case.segments("cpu"))
        measured.append((problem, measure(case, args.device, dtype, trained, args.budget)))
    if kept:
        write_text(kept, json.dumps([(dataclasses.asdict(problem), times) for problem, times in measured]))
    return measured


def runner(
    way: Way,
    out: torch.Tensor,
    x: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    pairs: Pairs,
    segments: Segments,
    trained: bool,
) -> Callable[[], Any]:
    if not trained:
        return lambda: add_products(out, x, pairs, segments, way)
    d_out = torch.ones_like(out)

    def step() -> None:
        result = add_trained(out.detach(), x, A, B, pairs.scales, segments, way)
        torch.autograd.grad(result, [x, *A, *B], d_out)

    return step


def least_times(runs: dict[str, Callable[[], Any]], device: str, budget_s: float) -> dict[str, float]:
    """Return the least time per call, in microseconds; what runs takes turns within the budget."""
    found = {}
    for name, run in runs.items():
        run()
        found[name] = min(timed(run, 1, device) for _ in range(4)) * 1e6
    # A way that is far behind is not worth waiting for: its time tells how far.
    close = {name: runs[name] for name in runs if found[name] < 6 * min(found.values())}
    loops = {name: max(1, int(200 / found[name])) for name in close}
    spent, turns = 0.0, 0
    while turns < 3 or (spent < budget_s * len(close) and turns < 60):
        for name, run in close.items():
            taken = timed(run, loops[name], device)
            found[name] = min(found[name], taken * 1e6)
            spent += taken * loops[name]
        turns += 1
    return found


def timed(run: Callable[[], Any], loops: int, device: str) -> float:
    """Return the seconds of a call: of one CPU thread its own, which other processes do not lengthen."""
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(loops):
        run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - start) / loops


def fit(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Return the coefficients, none negative, with the least squared relative error: the best of all subsets."""
    X = torch.tensor(rows, dtype=torch.float64) / torch.tensor(times, dtype=torch.float64)[:, None]
    ones, width = torch.ones(len(X), dtype=torch.float64), X.shape[1]
    best, found = math.inf, [0.0] * width
    for size in range(1, width + 1):
        for kept in itertools.combinations(range(width), size):
            values = torch.linalg.lstsq(X[:, kept], ones[:, None], driver="gelsd").solution[:, 0]
            error = float((X[:, kept] @ values - 1).square().sum())
            if bool((values >= 0).all()) and error < best:
                best, found = error, [0.0] * width
                for place, value in zip(kept, values.tolist(), strict=True):
                    found[place] = float(f"{value:.4g}")
    return found


def fit_all(measured: Measured) -> dict[str, list[float]]:
    """Return each way's coefficients."""
    found = {}
    for way in WAYS:
        own = [(problem.work(way), times[way]) for problem, times in measured if way in times]
        if own:
            found[way] = fit([work for work, _ in own], [taken for _, taken in own])
    return found


def regret(costs: dict[str, list[float]], measured: Measured) -> list[float]:
    """Return by what factor the chosen way is slower than the best one, per problem."""
    return [
        times[min(times, key=lambda way: predicted_us(costs[way], problem, way))] / min(times.values())
        for problem, times in measured
    ]


def nominal() -> dict[str, Any]:
    """Return the table of devices that were never measured; calls count, see ``NOMINAL``."""
    call, product, byte = NOMINAL.values()
    costs = {
        "runs": [0.0, 2 * call, product, byte, byte],
        "loop": [3 * call, 2 * call, product, byte, byte],
        "grouped": [4 * call, 0.0, product, byte, byte],
        "padded": [4 * call, 0.0, product, byte, byte],
        "joined": [4 * call, 0.0, product, byte, byte],
    }
    return {dtype: {"inference": costs, "trained": costs} for dtype in DTYPES}


def summary(factors: Sequence[float]) -> dict[str, float]:
    ordered = sorted(factors)
    return {
        "median": round(statistics.median(ordered), 3),
        "mean": round(statistics.fmean(ordered), 3),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "worst": round(ordered[-1], 3),
        "share_of_best": round(sum(factor < 1.005 for factor in ordered) / len(ordered), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds per way and size")
    parser.add_argument("--quick", action="store_true", help="a small grid, to try the script")
    parser.add_argument("--times", help="a folder for the measured times, to fit again without measuring")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    target = Path(str(resources.files("lorakit.kernels").joinpath("routed_costs.json")))
    before = json.loads(target.read_text(encoding="utf-8")).get("costs", {})
    found: dict[str, Any] = {}
    report: dict[str, Any] = {}
    for (label, dtype), trained in itertools.product(DTYPES.items(), (False, True)):
        mode = "trained" if trained else "inference"
        measured = measure_all(args, dtype, trained)
        random.Random(1).shuffle(measured)
        cut = len(measured) // 3
        report[f"{label}, {mode}"] = {
            "sizes": len(measured),
            **summary(regret(fit_all(measured[cut:]), measured[:cut])),
        }
        always = {
            way: statistics.fmean(t[way] / min(t.values()) for _, t in measured if way in t)
            for way in WAYS
            if any(way in t for _, t in measured)
        }
        report[f"{label}, {mode}"]["one way for all, mean"] = {way: round(value, 2) for way, value in always.items()}
        found.setdefault(label, {})[mode] = fit_all(measured)
    if not args.dry:
        costs = {**before, args.device: found, "other": nominal()}
        units = ["us", "us per piece", "us per M products", "us per MB of weights", "us per MB of rows"]
        write_text(target, json.dumps({"units": units, "costs": costs}, indent=1) + "\n")
    print(json.dumps(report) if args.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


if __name__ == "__main__":
    main()
