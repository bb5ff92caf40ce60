"""A small pretrained LLaMA learns E2E restaurant descriptions: perplexity before and after, and PEFT's losses.

Part 1 fits on ``e2e/valid.jsonl`` and measures on ``e2e/test.jsonl`` (other restaurants; the paper's training
split is not used). Part 2 trains the same recipe twice in fp32, through lorakit's loop and through PEFT with the
same A, B and batches, and prints the largest difference of their losses. Both need a folder with
``models/tiny-llama-en`` and ``data/e2e``: ``--shared``, LORAKIT_SHARED, or ``../shared`` beside the checkout.

    python benchmarks/bench_e2e.py [--steps 100] [--rows 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


class Losses:
    """Collects the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def observer(self) -> Any:
        """Return an observer that fills ``values``."""
        from lorakit.training.observe import Observer, Step

        outer = self

        class Collect(Observer):
            def step(self, step: Step) -> None:
                outer.values.append(step.loss)

        return Collect()


def perplexities(shared: Path, num_rows: int, seed: int, epochs: float | None) -> dict[str, float]:
    """Fit with no setting but the data (and the epochs, if given); measure before and after on test rows."""
    import lorakit as lk
    from lorakit.training.data.read import read_table
    from lorakit.training.data.table import Table
    from lorakit.training.objectives import evaluate

    result = lk.fit(shared / "models/tiny-llama-en", shared / "data/e2e/valid.jsonl", seed=seed, epochs=epochs)
    table = read_table(shared / "data/e2e/test.jsonl")
    rows = random.Random(0).sample(list(table.rows), min(num_rows, len(table.rows)))
    encoded = result.spec.read(Table(table.source, tuple(rows), table.unit), result.tokenizer)
    collate = result.spec.collator(result.tokenizer)
    after = evaluate(result.model, encoded.rows, collate)
    with result.handle.disabled():
        before = evaluate(result.model, encoded.rows, collate)
    return {
        "loss_before": before.loss,
        "loss_after": after.loss,
        "perplexity_before": before.perplexity or 0.0,
        "perplexity_after": after.perplexity or 0.0,
        "validation_perplexity_after": result.summary.after.perplexity or 0.0,
        "seconds": result.summary.seconds,
        "tokens_per_s": result.summary.tokens_per_s,
    }


def same_losses(shared: Path, num_steps: int) -> dict[str, float]:
    """Train the same recipe through lorakit and through PEFT; return how far apart their losses are."""
    import torch
    from peft import PeftModel

    import lorakit as lk
    from lorakit.training.config import TrainConfig
    from lorakit.training.data.batches import BatchOrder
    from lorakit.training.loop import train
    from lorakit.training.observe import Observer
    from lorakit.training.plan import Plan
    from lorakit.training.prepare import prepare
    from lorakit.training.schedule import Schedule

    model, data = shared / "models/tiny-llama-en", shared / "data/e2e/valid.jsonl"
    config = TrainConfig(dtype="fp32", seed=0, max_steps=num_steps)
    ours = prepare(model, data, config, None, Observer())
    theirs = prepare(model, data, config, None, Observer())
    collate = ours.spec.collator(ours.base.tokenizer)
    handle = lk.attach(ours.base.model, ours.method, seed=0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lk.save(handle, folder)
        peft_model = PeftModel.from_pretrained(theirs.base.model, folder, is_trainable=True)
    plan = Plan(num_steps, ours.recipe.batch_size, ours.recipe.batch_size, ours.recipe.lr)
    losses = Losses()
    task = ours.spec.kind
    train(handle, "default", task, ours.train, collate, plan, losses.observer())

    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=0.0, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule("linear", num_steps))
    peft_model.train()
    lengths = [len(row.input_ids) for row in theirs.train]
    found: list[float] = []
    epoch = 0
    while len(found) < num_steps:
        for numbers in BatchOrder(lengths, plan.batch_size, plan.seed, epoch):
            rows = [theirs.train[i] for i in numbers]
            loss = task.loss(peft_model, collate(rows)) / sum(task.units(row) for row in rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            found.append(float(loss.detach()))
            if len(found) == num_steps:
                break
        epoch += 1
    return {
        "steps": num_steps,
        "first_loss": losses.values[0],
        "last_loss": losses.values[-1],
        "max_difference": max(abs(a - b) for a, b in zip(losses.values, found, strict=True)),
    }


def main() -> None:
    """Run both parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("LORAKIT_SHARED", beside)))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=None, help="of part 1; chosen by the recipe if left out")
    given = parser.parse_args()
    if not (given.shared / "models/tiny-llama-en").is_dir():
        print(f"skipped: '{given.shared}' has no models/tiny-llama-en", file=sys.stderr)
        return
    print("same recipe through PEFT:", json.dumps(same_losses(given.shared, given.steps)))
    print(
        "fitted on valid, measured on test:",
        json.dumps(perplexities(given.shared, given.rows, given.seed, given.epochs)),
    )


if __name__ == "__main__":
    main()
