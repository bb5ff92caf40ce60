"""Time, memory and kept bytes of a training step: lorakit, PEFT, torch's parametrisation, full fine-tuning, the limit.

All ways take turns in one process on the same model and batch (see steps.py); a step is forward, backward, AdamW, with
the same loss code for all. The limit is the frozen base's forward and its backward to the inputs. 'floor' is that of
lorakit by count of operations: matrix products with the adapter over those without. 'saved' is what is kept for the
backward pass with the logits, each storage once. The losses stand beside them: who computes something else has
another one (with dropout each draws its own masks).

    OMP_NUM_THREADS=1 python benchmarks/bench_step.py [--rounds 9] [--only bf16] [--ways limit lorakit PEFT] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from steps import NOISY, WAYS, Case, Measured, compare, ratio, spread  # the path comes first

CASES = {
    "llama 33M, 4 x 256, fp32": Case(),
    "llama 33M, 4 x 256, fp32, dropout 0.1": Case(dropout=0.1),
    "llama 33M, 4 x 256, fp32, DoRA": Case(dora=True),
    "llama 33M, 4 x 256, bf16": Case(dtype="bf16"),
    "llama 33M, 4 x 256, bf16, dropout 0.1": Case(dtype="bf16", dropout=0.1),
    "llama 33M, 4 x 256, bf16, DoRA": Case(dtype="bf16", dora=True),
    "BERT (MiniLM's shape), 16 x 24, fp32": Case(model="bert", rows=16, length=24),
    "Mixtral-like 27M, 4 x 128, fp32": Case(model="mixtral", length=128),
}


def suitable(way: str, case: Case) -> bool:
    """Tell whether a way can train a case."""
    if "compiled" in way and case.model == "mixtral":
        return False  # each block chooses its experts as it goes
    return way != "parametrize" or (case.dropout == 0.0 and not case.dora and case.model == "llama")


def mib(size: int) -> str:
    """Return bytes in MiB, or room where they were not counted."""
    return f"{size / 2**20:9.1f}" if size else " " * 9


def lines(found: dict[str, Measured], case: Case) -> list[str]:
    """Return a table of one case."""
    limit, tokens = found["limit"], case.rows * case.length
    heads = f"{'':14} {'ms':>7} {'tokens/s':>9} {'over limit':>10} {'(quartiles)':>13} {'floor':>6}"
    written = [f"{heads} {'peak MiB':>9} {'saved MiB':>9} {'loss':>8}"]
    for way, one in found.items():
        middle, first, third = ratio(one, limit)
        ms = 1e3 * sorted(one.seconds)[len(one.seconds) // 2]
        floor = f"{one.flops / limit.flops:6.3f}" if way in ("limit", "lorakit", "full") else " " * 6
        written.append(
            f"{way:14} {ms:7.1f} {1e3 * tokens / ms:9.0f} {middle:10.3f} {f'{first:.3f}-{third:.3f}':>13} {floor} "
            f"{mib(one.peak_bytes)} {mib(one.saved_bytes)} {one.loss:8.4f}"
        )
    return written


def main() -> None:
    """Run the cases and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    ways = ["limit", *(way for way in given.ways if way != "limit")]
    results = {}
    for name, case in CASES.items():
        if given.only not in name:
            continue
        found = compare(case, [way for way in ways if suitable(way, case)], given.rounds)
        results[name] = {way: asdict(one) for way, one in found.items()}
        gc.collect()
        if not given.json:
            noise = spread(found["limit"])
            remark = f"   NOISY: the limit's steps spread by {noise:.0%}" if noise > NOISY else ""
            print(f"\n{name}, {torch.get_num_threads()} threads{remark}", *lines(found, case), sep="\n", flush=True)
    if given.json:
        print(json.dumps(results, indent=2))
    elif results:
        print("", *[f"{way}: {WAYS[way]}" for way in ways], sep="\n")


if __name__ == "__main__":
    main()
