"""Supervised tokens per second on E2E with a small pretrained LLaMA: lorakit against HF's Trainer with PEFT.

Every way trains the same encoded rows for the same steps of 8 rows, in a process of its own, in turns; a step's time
is the mean over the steps after the first fifty. 'defaults' are the Trainer's own settings (rows in random order,
padded to the longest of their batch) with PEFT's LoRA on all linear layers; 'best' adds length groups, the fused
optimizer and little logging. Full fine-tuning stands beside them. Needs a folder with ``models/tiny-llama-en`` and
``data/e2e``: ``--shared``, LORAKIT_SHARED, or ``../shared`` beside the checkout.

    OMP_NUM_THREADS=1 python benchmarks/bench_trainer.py [--turns 3] [--steps 100]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

WAYS = ("lorakit", "lorakit full", "trainer", "trainer best")
WARM = 50  # the Trainer's length groups run from long to short over 50 steps: only whole rounds are comparable
BATCH, RANK, ALPHA, RATE = 8, 8, 16, 1e-3


def paths(shared: Path) -> tuple[str, str]:
    """Return the model and the rows."""
    return str(shared / "models/tiny-llama-en"), str(shared / "data/e2e/valid.jsonl")


def with_lorakit(shared: Path, steps: int, method: str) -> dict[str, Any]:
    """Train with ``lorakit.fit``; each step's seconds and the losses are what its observer is told."""
    import lorakit as lk
    from lorakit.training.observe import Observer, Step

    seen: list[Step] = []

    class Watch(Observer):
        def step(self, step: Step) -> None:
            seen.append(step)

    model, rows = paths(shared)
    lk.fit(model, rows, method=method, max_steps=steps, lr=RATE if method == "lora" else RATE / 10, observer=Watch())
    seconds = [b.seconds - a.seconds for a, b in zip(seen[WARM:], seen[WARM + 1 :], strict=False)]
    return {"seconds": statistics.mean(seconds), "losses": [step.loss for step in seen]}


def with_trainer(shared: Path, steps: int, best: bool) -> dict[str, Any]:
    """Train the same rows with HF's Trainer on PEFT's model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    model_folder, _ = paths(shared)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    encoded = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded_rows(shared)]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[i, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    more: dict[str, Any] = (
        {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused", "logging_steps": 10}
        if best
        else {"logging_steps": 1}
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            warmup_steps=4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **more,
        )
        trainer = Trainer(get_peft_model(model, config), settings, collate, encoded, callbacks=[clock])
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    seconds = [b - a for a, b in zip(clock.times[WARM:], clock.times[WARM + 1 :], strict=False)]
    return {"seconds": statistics.mean(seconds), "losses": losses}


def encoded_rows(shared: Path) -> Any:
    """Return the rows as tokens and labels, as lorakit encodes them."""
    from transformers import AutoTokenizer

    from lorakit.training.data.read import read_table
    from lorakit.training.spec import TaskSpec

    model, rows = paths(shared)
    spec = TaskSpec("generation", max_length=512, chat=True)
    return spec.read(read_table(rows), AutoTokenizer.from_pretrained(model)).rows


def measure(way: str, shared: Path, steps: int) -> dict[str, Any]:
    """Measure one way in this process."""
    warnings.simplefilter("ignore")
    if way.startswith("lorakit"):
        return with_lorakit(shared, steps, "full" if way.endswith("full") else "lora")
    return with_trainer(shared, steps, best=way.endswith("best"))


def main() -> None:
    """Let the ways take turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    default = os.environ.get("LORAKIT_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(default))
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (given.shared / "models/tiny-llama-en").is_dir():
        print("no models/tiny-llama-en: skipped (see --help)")
        return
    if given.worker:
        print(json.dumps(measure(given.worker, given.shared, given.steps)))
        return
    rows = encoded_rows(given.shared)
    supervised = statistics.mean(sum(label != -100 for label in row.labels) for row in rows)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(given.turns):
        for way in WAYS if turn % 2 == 0 else tuple(reversed(WAYS)):
            command = [sys.executable, __file__, "--worker", way, "--steps", str(given.steps), "--shared"]
            output = subprocess.run([*command, str(given.shared)], check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(output.splitlines()[-1]))
    base = [result["seconds"] for result in found["trainer"]]
    print(f"{BATCH} rows a step, {supervised:.1f} supervised tokens a row; speed over the Trainer's defaults\n")
    for way, results in found.items():
        speeds = [BATCH * supervised / result["seconds"] for result in results]
        ratios = [theirs / own["seconds"] for theirs, own in zip(base, results, strict=True)]
        losses = results[0]["losses"]
        last = float(losses[-1]) if way.endswith("best") else statistics.mean(float(loss) for loss in losses[-10:])
        print(
            f"{way:14} {statistics.median(speeds):7.1f} supervised tokens/s   x {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})   mean loss of the last 10 steps {last:.3f}"
        )


if __name__ == "__main__":
    main()
