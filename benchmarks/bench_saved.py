"""What each way to train keeps for the backward pass, against full fine-tuning, on a LLaMA's blocks without the logits.

Counted by looking at every tensor that is kept, each storage once, without weights. The losses of five AdamW steps
stand beside, so that nobody keeps less by computing something else.

    python benchmarks/bench_saved.py [--dtype bf16] [--width 256] [--layers 4]
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from steps import Case, Trainer  # the path comes first

LINES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("limit", {}),
    ("lorakit", {}),
    ("lorakit", {"dropout": 0.05}),
    ("recompute", {}),
    ("recompute", {"dropout": 0.05}),
    ("lorakit", {"dora": True}),
    ("recompute", {"dora": True}),
    ("recompute", {"dora": True, "dropout": 0.05}),
    ("PEFT", {}),
    ("PEFT", {"dropout": 0.05}),
    ("PEFT", {"dora": True}),
    ("PEFT, best", {}),
]
STEPS = 5


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    usual = Case(dtype=given.dtype, width=given.width, layers=given.layers)
    full = 0
    print(f"{'':12} {'':24} {'saved MiB':>10} {'of full':>8} {'loss':>9}")
    for way, fields in LINES:
        trainer = Trainer(way, replace(usual, **fields))
        loss = [trainer.step() for _ in range(STEPS)][-1]
        saved = trainer.saved_bytes(body=True)
        full = saved if way == "full" else full
        words = ", ".join(f"{name} {value}" for name, value in fields.items())
        print(f"{way:12} {words:24} {saved / 2**20:10.1f} {saved / full:8.2f} {loss:9.5f}", flush=True)


if __name__ == "__main__":
    main()
