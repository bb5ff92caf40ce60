"""LoRA, full fine-tuning and the head alone on E2E with a small pretrained LLaMA, beside HF's Trainer with PEFT.

Every way trains the same encoded rows for the same steps of 8 rows, in a process of its own, in turns; a step's time
is the mean over the steps after the first fifty. 'trainer' has the Trainer's own settings (rows in random order,
padded to the longest of their batch) with PEFT's LoRA on all linear layers; 'trainer best' adds length groups, the
fused optimizer and little logging. 'lorakit head' trains a head of its own: the model's is its embedding, so a copy is
made first. Afterwards each model is measured on the same rows of the test file, whose restaurants are others. Memory
is what tensors take above the loaded base at the peak of two steps on the eight longest rows, adapter and optimizer
included (of 'lorakit compiled' that of 'lorakit'; compiling ends before the steps that count).

The model is loaded as it is stored, in bf16, which is what both do unasked on a processor with AMX; ``--dtype fp32``
makes it fp32 for both. Ratios are taken within turns. 'CPU' is the ratio of processor seconds, which other work on the
machine disturbs less; a note says how much of the time that work took. Needs a folder with ``models/tiny-llama-en`` and
``data/e2e``: ``--shared``, LORAKIT_SHARED, or ``../shared`` beside the checkout.

    OMP_NUM_THREADS=1 python benchmarks/bench_trainer.py [--turns 3] [--steps 100] [--dtype fp32]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("lorakit", "lorakit compiled", "lorakit head", "lorakit full", "trainer", "trainer best")
WARM = 50  # the Trainer's length groups run from long to short over 50 steps: only whole rounds are comparable
BATCH, RANK, ALPHA, RATE = 8, 8, 16, 1e-3
NUM_TEST_ROWS = 200


def paths(shared: Path) -> tuple[str, str]:
    """Return the model and the rows."""
    return str(shared / "models/tiny-llama-en"), str(shared / "data/e2e/valid.jsonl")


class Clock:
    """The times of steps, on the wall and of the processor."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """Note the end of a step."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def seconds(self) -> dict[str, float]:
        """Return mean seconds per step after the first ones."""
        count = len(self.wall) - 1 - WARM
        return {"seconds": (self.wall[-1] - self.wall[WARM]) / count, "cpu": (self.cpu[-1] - self.cpu[WARM]) / count}


def base_model(shared: Path, dtype: str, untied: bool = False) -> Any:
    """Return the model, on request with a head that is a copy of its embedding."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted: Any = torch.float32 if dtype == "fp32" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(paths(shared)[0], dtype=wanted)
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def tokenizer_of(shared: Path) -> Any:
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(paths(shared)[0])


def with_lorakit(shared: Path, steps: int, way: str, dtype: str) -> dict[str, Any]:
    """Train with ``lorakit.fit``; its observer is told the end of each step, and its loss."""
    import lorakit as lk
    from lorakit.training.observe import Observer, Step

    clock, losses = Clock(), []
    method = way if way in ("head", "full") else "lora"

    class Watch(Observer):
        def step(self, step: Step) -> None:
            clock.tick()
            losses.append(step.loss)

    _, rows = paths(shared)
    result = lk.fit(
        base_model(shared, dtype, untied=True) if method == "head" else paths(shared)[0],
        rows,
        tokenizer=tokenizer_of(shared) if method == "head" else None,
        dtype="fp32" if dtype == "fp32" else "auto",
        method=method,
        max_steps=steps,
        lr=RATE / 10 if method == "full" else RATE,
        compile=way == "compiled",
        observer=Watch(),
    )
    return {
        **clock.seconds(),
        "losses": losses,
        "trained": result.summary.num_trainable,
        **tested(result.model, shared),
    }


def tested(model: Any, shared: Path) -> dict[str, float]:
    """Return the loss per token on rows of the test file."""
    spec, rows = encoded(shared, str(shared / "data/e2e/test.jsonl"))
    drawn = random.Random(0).sample(range(len(rows)), NUM_TEST_ROWS)
    collate = spec.collator(tokenizer_of(shared))
    return {"test": spec.kind.evaluate(model, [rows[i] for i in drawn], collate).loss}


def with_trainer(shared: Path, model: Any, rows: Any, steps: int, best: bool) -> tuple[Any, Clock, list[float]]:
    """Train rows with HF's Trainer on PEFT's model of ``model``; return that, the clock and the losses."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokenizer, clock = tokenizer_of(shared), Clock()
    given = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            mask[i, :n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
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
        trainer = Trainer(get_peft_model(model, config), settings, collate, given, callbacks=[Watch()])
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, clock, losses


def encoded(shared: Path, rows: str) -> tuple[Any, Any]:
    """Return the task and a file's rows as tokens and labels, as lorakit encodes them."""
    from lorakit.training.data.read import read_table
    from lorakit.training.spec import TaskSpec

    spec = TaskSpec("generation", max_length=512, chat=True)
    return spec, spec.read(read_table(rows), tokenizer_of(shared)).rows


def measure(way: str, shared: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Measure time and losses of one way in this process."""
    if way.startswith("lorakit"):
        return with_lorakit(shared, steps, way.removeprefix("lorakit "), dtype)
    _, rows = encoded(shared, paths(shared)[1])
    model, clock, losses = with_trainer(shared, base_model(shared, dtype), rows, steps, way.endswith("best"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {**clock.seconds(), "losses": losses, "trained": trained, **tested(model, shared)}


def memory_of(way: str, shared: Path, dtype: str) -> dict[str, Any]:
    """Measure the memory of one way in this process: two steps on the longest rows."""
    import torch

    from lorakit.methods import find_method
    from lorakit.training.costs import probe
    from lorakit.training.memory import peak_bytes
    from lorakit.training.plan import Plan

    spec, rows = encoded(shared, paths(shared)[1])
    longest = sorted(rows, key=lambda row: -len(row.input_ids))[:BATCH]
    if way.startswith("lorakit"):
        name = found if (found := way.removeprefix("lorakit ")) in ("head", "full") else "lora"
        model = base_model(shared, dtype, untied=name == "head").requires_grad_(False).eval()
        plan, collate = Plan(2, BATCH, BATCH, RATE), spec.collator(tokenizer_of(shared))
        attaching = {"targets": "all-linear"} if name == "lora" else {}
        method = find_method({"name": name, "rank": RANK, "alpha": ALPHA} if name == "lora" else name)
        return {"peak": probe(model, spec.kind, collate, method, attaching, plan, longest).peak_bytes}
    model = base_model(shared, dtype)
    train: Callable[[], Any] = lambda: with_trainer(shared, model, longest, 2, way.endswith("best"))  # noqa: E731
    return {"peak": peak_bytes(train, torch.device("cpu"))}


def worker(way: str, shared: Path, *options: str) -> dict[str, Any]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--worker", way, "--shared", str(shared), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {key: value for key, value in found.items() if key != "losses"}
    print(f"{way}: {json.dumps(shown)}", file=sys.stderr, flush=True)
    return found


def show(found: dict[str, list[dict[str, Any]]], peaks: dict[str, int], supervised: float) -> None:
    """Print speeds and losses."""
    print(f"{BATCH} rows a step, {supervised:.1f} supervised tokens a row; speed over the Trainer's defaults, median")
    print("(range) of the turns; loss per token on test rows; peak memory above the base\n")
    print(f"{'':14}{'tokens/s':>9}  {'speed':18}{'CPU':>6}{'test':>8}{'memory':>11}{'trained':>13}")
    for way, results in found.items():
        pairs = list(zip(found["trainer"], results, strict=True))
        wall = sorted(theirs["seconds"] / own["seconds"] for theirs, own in pairs)
        cpu = statistics.median(theirs["cpu"] / own["cpu"] for theirs, own in pairs)
        speed = statistics.median(BATCH * supervised / own["seconds"] for own in results)
        ratio = f"{statistics.median(wall):.2f} ({wall[0]:.2f}-{wall[-1]:.2f})"
        print(
            f"{way:14}{speed:9.0f}  {ratio:18}{cpu:6.2f}{results[0]['test']:8.3f}"
            f"{peaks[way] / 2**20:7.1f} MiB{results[0]['trained']:13,}"
        )
    print("\nmean training loss of steps      1-10    46-55      last 10")
    for way, results in found.items():
        losses = results[0]["losses"]
        if len(losses) >= WARM + 10:
            parts = losses[:10], losses[WARM - 5 : WARM + 5], losses[-10:]
            print(f"{way:27}" + "".join(f"{statistics.mean(part):10.3f}" for part in parts))
        else:  # logged every ten steps
            print(f"{way:27}{losses[0]:10.3f}{losses[len(losses) // 2]:10.3f}{losses[-1]:10.3f}   (other rows)")
    shares = [result["cpu"] / result["seconds"] for results in found.values() for result in results]
    if min(shares) < 0.95:
        print(f"\nNoisy: other work on this machine took up to {1 - min(shares):.0%} of the time of a run.")


def main() -> None:
    """Let the ways take turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("stored", "fp32"), default="stored")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, help="'trainer' is always among them")
    default = os.environ.get("LORAKIT_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--shared", type=Path, default=Path(default))
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps < WARM + 10:
        parser.error(f"--steps must be at least {WARM + 10}: the first {WARM} are not timed")
    if not (given.shared / "models/tiny-llama-en").is_dir():
        print("no models/tiny-llama-en: skipped (see --help)")
        return
    warnings.simplefilter("ignore")
    if given.worker:
        if given.memory:
            print(json.dumps(memory_of(given.worker, given.shared, given.dtype)))
        else:
            print(json.dumps(measure(given.worker, given.shared, given.steps, given.dtype)))
        return
    _, rows = encoded(given.shared, paths(given.shared)[1])
    supervised = statistics.mean(sum(label != -100 for label in row.labels) for row in rows)
    ways = [way for way in WAYS if way in given.only or way == "trainer"]
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(given.turns):
        for way in ways if turn % 2 == 0 else reversed(ways):
            results[way].append(worker(way, given.shared, "--steps", str(given.steps), "--dtype", given.dtype))
    peaks = {way: int(worker(way, given.shared, "--memory", "--dtype", given.dtype)["peak"]) for way in ways}
    show(results, peaks, supervised)


if __name__ == "__main__":
    main()
