"""How a training step's cost over the frozen base grows along each axis: lorakit, PEFT, and the count of operations.

One axis at a time leaves the LLaMA-like model of 33 M parameters, 4 x 256 tokens, rank 8, all linear layers, fp32. At
each point the frozen base (forward, and backward to its inputs), lorakit and PEFT take turns in one process (steps.py).
'floor' is lorakit's matrix products over the base's, by count. Results go to a JSON file, from which the picture can
be drawn again.

Two more axes have bench_routed.py's model (4 layers of width 512) and a training step without an optimizer: a batch of
256 rows of 4 tokens with as many different adapters, and 8 rows of 128 tokens with one of as many adapters that are
loaded. PEFT is left out where adding so many takes it minutes.

    OMP_NUM_THREADS=1 python benchmarks/bench_axes.py [--only rank width] [--rounds 5] [--image FILE.png]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_routed import VOCABULARY, Ours, Peft, base, step  # the path comes first
from steps import NOISY, Case, Measured, compare, in_turns, ratio, spread

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "rank": {str(rank): {"rank": rank} for rank in (4, 8, 16, 32, 64, 128, 256)},
    "tokens in a row (1,024 in all)": {
        str(length): {"length": length, "rows": 1024 // length} for length in (32, 64, 128, 256, 512, 1024)
    },
    "rows of 256 tokens": {str(rows): {"rows": rows} for rows in (1, 2, 4, 8)},
    "width": {str(width): {"width": width, "layers": 4} for width in (128, 256, 512, 1024)},
    "layers": {str(layers): {"layers": layers} for layers in (2, 4, 8, 16)},
    "targets": {
        "q, v": {"targets": ("q_proj", "v_proj")},
        "attention": {"targets": ATTENTION},
        "MLP": {"targets": ("gate_proj", "up_proj", "down_proj")},
        "all": {},
    },
    "dtype and dropout": {
        "fp32": {},
        "fp32, 0.1": {"dropout": 0.1},
        "bf16": {"dtype": "bf16"},
        "bf16, 0.1": {"dtype": "bf16", "dropout": 0.1},
    },
    "rank, bf16": {str(rank): {"rank": rank, "dtype": "bf16"} for rank in (4, 8, 16, 32, 64, 128, 256)},
    "width, bf16": {str(width): {"width": width, "layers": 4, "dtype": "bf16"} for width in (128, 256, 512, 1024)},
}
COUNTS = {
    "adapters in a batch of 256 rows": (1, 2, 4, 8, 16, 64, 256),
    "adapters loaded": (1, 10, 100, 1000),
}
MOST_OF_PEFT = 256
WAYS = ("limit", "lorakit", "PEFT")


def measured(fields: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Measure one point."""
    case = replace(Case(), **fields)
    found = compare(case, WAYS, rounds, memory=False)
    return {
        **figures(found, case.rows * case.length),
        "floor": found["lorakit"].flops / found["limit"].flops,
        "losses": {way: one.loss for way, one in found.items()},
    }


def stepping(library: Any, ids: torch.Tensor, names: list[str] | None) -> Callable[[], None]:
    """Return a forward and backward pass that leaves no gradients; adapters that had none are not looked at."""
    both = step(library, ids, names, True, clear=False)
    both()
    parameters = [parameter for parameter in library.model.parameters() if parameter.grad is not None]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        both()

    return run


def measured_many(count: int, in_batch: bool, rounds: int) -> dict[str, Any]:
    """Measure a training step with many adapters, all of them in the batch or one of those that are loaded."""
    shape = (256, 4) if in_batch else (8, 128)
    ids = torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
    names = [f"a{i % count}" for i in range(shape[0])] if in_batch and count > 1 else None
    frozen = base(4, torch.float32)

    def limit() -> None:
        embedded = frozen.get_input_embeddings()(ids).detach().requires_grad_()
        frozen(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()

    runs: dict[str, Any] = {"limit": limit}
    for kind, way in ((Ours, "lorakit"), (Peft, "PEFT")):
        if way == "lorakit" or count <= MOST_OF_PEFT:
            library = kind(4, count, torch.float32)
            if in_batch:
                library.trainable(True)
            runs[way] = stepping(library, ids, names)
    seconds, _ = in_turns(runs, rounds, warm_up=2)
    return figures({way: Measured(tuple(each), 0, 0, 0.0, 0) for way, each in seconds.items()}, ids.numel())


def figures(found: Mapping[str, Measured], tokens: int) -> dict[str, Any]:
    """Return what every axis shows."""
    limit = found["limit"]
    return {
        "ms": {way: 1e3 * sorted(one.seconds)[len(one.seconds) // 2] for way, one in found.items()},
        "over": {way: ratio(one, limit) for way, one in found.items() if way != "limit"},
        "tokens": tokens,
        "noise": spread(limit),
    }


def line(name: str, point: Mapping[str, Any]) -> str:
    """Return a point in words."""
    tokens = 1e3 * point["tokens"] / point["ms"]["lorakit"]
    over = [
        f"{each[0]:8.3f} ({each[1]:.3f}-{each[2]:.3f})" if (each := point["over"].get(way)) else " " * 22
        for way in WAYS[1:]
    ]
    floor = f"{point['floor']:7.3f}" if "floor" in point else " " * 7
    losses = " ".join(f"{loss:8.4f}" for way, loss in point.get("losses", {}).items() if way != "limit")
    text = f"{name:>12} {point['ms']['limit']:8.1f} {' '.join(over)} {floor} {tokens:9.0f} {losses}"
    return text + (f"   NOISY ({point['noise']:.0%})" if point["noise"] > NOISY else "")


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw each axis: time over the frozen base of lorakit and PEFT, with quartiles, and the floor."""
    from lorakit.files import atomic_write
    from lorakit.reports.theme import LIGHT, new_figure, set_axis_labels, set_title, style_axes, to_bytes

    columns = 3
    rows = -(-len(results) // columns)
    figure = new_figure(12.0, 3.1 * rows, LIGHT)
    for place, (axis, points) in enumerate(results.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        style_axes(axes, LIGHT, "y")
        line = "-" if all(name.isdigit() for name in points) else ""  # between words there is nothing
        for way, colour in (("PEFT", LIGHT.validation), ("lorakit", LIGHT.adapted)):
            seen = [point["over"][way] for point in points.values() if way in point["over"]]
            at, (middle, first, third) = list(range(len(seen))), zip(*seen, strict=True)
            if line:
                axes.fill_between(at, first, third, color=colour, alpha=0.18, linewidth=0)
            else:
                axes.vlines(at, first, third, color=colour, alpha=0.4, linewidth=4)
            axes.plot(at, middle, color=colour, marker="o", markersize=4, linestyle=line, linewidth=1.6, label=way)
        floor = [point["floor"] for point in points.values() if "floor" in point]
        words = {"linestyle": "--", "linewidth": 1.2} if line else {"linestyle": "", "marker": "_", "markersize": 14}
        axes.plot(range(len(floor)), floor, color=LIGHT.muted, label="by count of operations", **words)
        axes.axhline(1.0, color=LIGHT.muted, linewidth=0.8)
        axes.set_xticks(range(len(points)), list(points))
        axes.set_ylim(bottom=0.95)
        set_title(axes, LIGHT, axis, "step over the frozen base's")
        set_axis_labels(axes, LIGHT, "", "")
        if place == 0:
            axes.legend(frameon=False, fontsize=8)
    with atomic_write(file) as temporary:
        temporary.write_bytes(to_bytes(figure))


def main() -> None:
    """Measure the axes, print them, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="AXIS", help="axes whose name begins with one of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("experiments/results/axes.json"))
    parser.add_argument("--image", type=Path, help="draw all that is in the results")
    given = parser.parse_args()
    from lorakit.files import write_json

    warnings.simplefilter("ignore")
    results = json.loads(given.results.read_text(encoding="utf-8")) if given.results.exists() else {}
    each = f"{'lorakit':>8} {'(quartiles)':>13} {'PEFT':>8} {'(quartiles)':>13}"
    heads = f"{'base ms':>8} {each} {'floor':>7} {'tokens/s':>9}"
    axes: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
        axis: {name: partial(measured, fields, given.rounds) for name, fields in points.items()}
        for axis, points in AXES.items()
    }
    for axis, counts in COUNTS.items():
        axes[axis] = {str(count): partial(measured_many, count, "batch" in axis, given.rounds) for count in counts}
    for axis, measures in axes.items():
        if given.only and not any(axis.startswith(word) for word in given.only):
            continue
        print(f"\n{axis}, {torch.get_num_threads()} threads\n{'':>12} {heads} {'losses: lorakit, PEFT':>8}", flush=True)
        results[axis] = {}
        for name, measure in measures.items():
            results[axis][name] = measure()
            print(line(name, results[axis][name]), flush=True)
            gc.collect()
        given.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.results, _in_order(results))
    if given.image is not None:
        draw(_in_order(results), given.image)
        print(f"written: {given.image}")


def _in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    known: Sequence[str] = [axis for axis in (*AXES, *COUNTS) if axis in results]
    return {axis: results[axis] for axis in known}


if __name__ == "__main__":
    main()
