"""Packed against padded steps: supervised tokens a second, at several spreads of lengths, losses beside.

Each way takes its step on the same rows in turn, so that a noisy machine disturbs all alike; the time is that of one
thread on the processor. A step is forward and backward of a micro-batch with LoRA on all linear layers. The rows are
cut in batches as a run cuts them: rows of like length together.

    padded     each row on its own, to a multiple of 8: what a run does without packing
    padded-1   likewise, not rounded to 8
    packed     what `--packing on` does: sequences as wide as the longest row, where they spare a tenth of the rows
    one        all rows of the micro-batch in one sequence, under a dense mask

E2E's real rows need a folder with ``models/tiny-llama-en`` and ``data/e2e``: ``--shared``, LORAKIT_SHARED, or
``../shared`` beside the checkout. Without it the lengths are drawn.

    python benchmarks/bench_packing.py [--batches 12] [--micro 8] [--rows 2000] [--width 256] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

WAYS = ("padded", "padded-1", "packed", "one")


def lengths_of(kind: str, count: int, longest: int = 512) -> list[int]:
    """Draw the lengths of rows."""
    draw = random.Random(0)
    drawn: dict[str, Callable[[], float]] = {
        "alike": lambda: draw.randint(56, 72),
        "uniform": lambda: draw.randint(16, 192),
        "lognormal": lambda: draw.lognormvariate(4.0, 0.8),
        "two sizes": lambda: draw.choice([24, 24, 24, 320]),
    }
    return [min(longest, max(8, int(drawn[kind]()))) for _ in range(count)]


def rows_of(lengths: list[int], words: int) -> list[Any]:
    """Return rows of drawn tokens, the second half of each supervised."""
    from lorakit.training.data.encode import IGNORED, EncodedRow

    draw = random.Random(1)
    found = []
    for number, length in enumerate(lengths):
        ids = [draw.randrange(5, words) for _ in range(length)]
        found.append(EncodedRow(ids, [IGNORED] * (length // 2) + ids[length // 2 :], number, "", ""))
    return found


def drawn_model(width: int) -> Any:
    """Return a frozen LLaMA with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=6,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def real(shared: Path) -> tuple[Any, list[Any]]:
    """Return the real model and E2E's rows as a run encodes them."""
    from lorakit.training.config import TrainConfig
    from lorakit.training.observe import Observer
    from lorakit.training.prepare import prepare

    model, data = shared / "models/tiny-llama-en", shared / "data/e2e/valid.jsonl"
    prepared = prepare(model, data, TrainConfig(), None, Observer())
    return prepared.base.model.requires_grad_(False), list(prepared.train)


def measured(name: str, model: Any, rows: list[Any], micro: int, num_batches: int) -> dict[str, Any]:
    """Take the steps of some of an epoch's batches in every way."""
    import lorakit as lk
    from lorakit.training.data.batches import BatchOrder, Collator
    from lorakit.training.packing import PackingCollator, positions_of
    from lorakit.training.plan import Plan
    from lorakit.training.spec import TaskSpec
    from lorakit.training.stepper import Stepper

    task = TaskSpec("generation", max_length=2048).kind
    handle = lk.attach(model, lk.LoRA(rank=8), seed=0)
    padded = Collator(0, max_length=2048)
    lengths = [len(row.input_ids) for row in rows]
    ways: dict[str, Any] = {
        "padded": padded,
        "padded-1": replace(padded, pad_to=1),
        "packed": PackingCollator(padded),
        "one": PackingCollator(padded, whole=True),
    }
    stepper = Stepper(handle, "default", task, padded, Plan(1, micro, micro, 1e-3))
    model.train()
    batches = list(BatchOrder(lengths, micro))[:num_batches]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    units = []
    for turn, numbers in enumerate([batches[0], *batches]):  # the first of them warms up
        chosen = [rows[i] for i in numbers]
        for way in sorted(ways, key=lambda way: random.Random(f"{turn}/{way}").random()):
            stepper.batching = ways[way]
            begun = time.process_time()
            loss = stepper.gradients(chosen)
            taken = time.process_time() - begun
            stepper.optimizer.zero_grad()
            if turn:
                seconds[way].append(taken)
                losses[way].append(loss)
        if turn:
            units.append(sum(task.units(row) for row in chosen))
    handle.detach()
    found = positions_of(lengths, micro, micro, 0, PackingCollator(padded))
    changed = sum(PackingCollator(padded).filled([lengths[i] for i in numbers]) is not None for numbers in batches)
    return {
        "rows": name,
        "padding": found.padding,
        "spared": found.spared,
        "batches": len(batches),
        "packed_batches": changed,
        "tokens_per_s": {way: sum(units) / sum(seconds[way]) for way in ways},
        "ratio": {way: sum(seconds["padded"]) / sum(seconds[way]) for way in ways},
        "median_ratio": {
            way: statistics.median(a / b for a, b in zip(seconds["padded"], seconds[way], strict=True)) for way in ways
        },
        "loss_apart": {
            way: max(abs(a - b) / abs(b) for a, b in zip(losses[way], losses["padded"], strict=True)) for way in ways
        },
    }


def main() -> None:
    """Measure and print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256, help="of the model with random weights")
    parser.add_argument("--only", nargs="*", help="kinds of rows; all by default")
    parser.add_argument("--shared", default=os.environ.get("LORAKIT_SHARED"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(options.shared or Path(__file__).resolve().parents[2] / "shared")
    kinds = options.only or ["alike", "uniform", "lognormal", "two sizes", "few rows", "e2e"]
    found = []
    for kind in kinds:
        if kind == "e2e":
            if not (shared / "models/tiny-llama-en").is_dir():
                continue
            model, rows = real(shared)
        else:
            model = drawn_model(options.width)
            count = 64 if kind == "few rows" else options.rows
            rows = rows_of(lengths_of("lognormal" if kind == "few rows" else kind, count), 8192)
        found.append(measured(kind, model, rows, options.micro, options.batches))
        if not options.json:
            show(found[-1])
    if options.json:
        print(json.dumps(found, indent=2))


def show(found: dict[str, Any]) -> None:
    """Print one kind of rows."""
    print(
        f"{found['rows']}: {100 * found['padding']:.1f} % padding, packing spares {100 * found['spared']:.1f} % of an "
        f"epoch's positions; {found['packed_batches']} of {found['batches']} batches measured are packed"
    )
    for way in WAYS:
        print(
            f"  {way:9} {found['tokens_per_s'][way]:8,.0f} supervised tokens/s   x {found['ratio'][way]:.3f} in all, "
            f"{found['median_ratio'][way]:.3f} median   loss within {found['loss_apart'][way]:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
