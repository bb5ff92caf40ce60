"""What `lorakit plan` estimates beside what a step takes: real models, several shapes and methods.

The estimate simulates the step without memory; the figure beside it is the peak of two real steps (every storage that
an operation makes is counted while it lives; on a GPU the allocator's own count), above the loaded base. Models that
are not here are left out, and that is said.

    python benchmarks/bench_plan.py [--model FOLDER ...] [--device cuda] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMISED = 0.15
METHODS: dict[str, Any] = {
    "lora": {"name": "lora", "rank": 8},
    "dora": {"name": "dora", "rank": 8},
    "head": {"name": "head"},
    "full": None,
}


@dataclass(frozen=True)
class Case:
    """One shape: rows in memory, tokens in the longest, how much shorter each next row is, rows of a step."""

    rows: int
    tokens: int
    shorter: int = 0
    batch: int | None = None
    method: str = "lora"
    dtype: str = "fp32"
    checkpointing: bool = False

    def __str__(self) -> str:
        """Say the shape in words."""
        words = [f"{self.rows} x {self.tokens}", self.method, self.dtype]
        words += [f"padded by {self.shorter}"] if self.shorter else []
        words += [f"batch {self.batch}"] if self.batch else []
        words += ["checkpointing"] if self.checkpointing else []
        return ", ".join(words)


CASES = (
    Case(4, 64),
    Case(2, 256),
    Case(8, 128, shorter=5),
    Case(2, 128, batch=4),
    Case(4, 128, method="dora"),
    Case(4, 128, method="head"),
    Case(4, 128, method="full"),
    Case(4, 128, dtype="bf16"),
    Case(4, 128, checkpointing=True),
)


def folders(given: list[str]) -> dict[str, tuple[str, str]]:
    """Return name, folder and task of the models that are here."""
    from lorakit.demos.text import BASE_NAME, model_folder
    from lorakit.errors import InputError

    found = {
        Path(folder).name: (folder, "language-modeling") for folder in given if (Path(folder) / "config.json").is_file()
    }
    for folder in sorted(set(given) - {place for place, _ in found.values()}):
        print(f"left out: '{folder}' is not here")
    try:
        found[BASE_NAME] = (model_folder(), "classification")
    except InputError as error:  # the package that holds the model is optional
        print(f"left out: {error}")
    return found


def measure(folder: str, task: str, case: Case, device: str) -> dict[str, Any] | None:
    """Return both figures of one case; None for a method that this model refuses."""
    from lorakit.bases import DTYPES, load_base
    from lorakit.errors import TargetError
    from lorakit.methods import find_method
    from lorakit.training.costs import Setup, probe, simulate
    from lorakit.training.data.encode import EncodedRow
    from lorakit.training.plan import Plan
    from lorakit.training.spec import TaskSpec

    labels = tuple("abcdefgh") if task == "classification" else ()
    base = load_base(folder, task, labels=labels, dtype=case.dtype, device=device)
    chosen = METHODS[case.method]
    method = find_method(chosen) if chosen else None
    plan = Plan(10, case.batch or case.rows, case.rows, 1e-3, dtype=case.dtype, grad_checkpointing=case.checkpointing)
    attaching: dict[str, Any] = {"seed": 0, "train_modules": ["head"] if labels else []}
    spec = TaskSpec(task, labels, max_length=512)
    pad = int(base.tokenizer.pad_token_id or 0)
    setup = Setup(base.model.config, DTYPES[case.dtype], spec, method, attaching, plan, pad)
    lengths = [case.tokens - (i % case.rows) * case.shorter for i in range(case.batch or case.rows)]
    rows = [EncodedRow([7] * n, 0 if labels else [7] * n, i, "", "") for i, n in enumerate(lengths)]
    begun = time.perf_counter()
    try:
        estimated = simulate(setup, rows[: case.rows]).memory.above_weights
    except TargetError:
        return None
    seconds = time.perf_counter() - begun
    found = probe(base.model, spec.kind, spec.collator(base.tokenizer), method, attaching, plan, rows)
    return {"estimated": estimated, "measured": found.peak_bytes, "simulation_s": seconds, "step_s": found.seconds}


def main() -> int:
    """Measure everything; return 1 if an estimate is further off than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a folder with a decoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    worst = 0.0
    for name, (folder, task) in folders(given.model).items():
        for case in CASES:
            found = measure(folder, task, case, given.device)
            if found is None:
                print(f"{name:18} {case!s:40} refused: its head is tied to the embedding")
                continue
            error = found["estimated"] / found["measured"] - 1
            worst = max(worst, abs(error))
            results[f"{name}, {case}"] = {**found, "error": error}
            print(
                f"{name:18} {case!s:40} estimated {found['estimated'] / 2**20:8.1f} MiB, measured "
                f"{found['measured'] / 2**20:8.1f} MiB ({100 * error:+.2f} %); simulated in "
                f"{found['simulation_s']:.1f} s"
            )
    if given.json:
        print(json.dumps(results, indent=2))
    print(f"worst {100 * worst:.2f} %, promised {100 * PROMISED:.0f} %")
    return 0 if worst <= PROMISED else 1


if __name__ == "__main__":
    raise SystemExit(main())
