"""Runs as a training leaves them behind, made up from a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.records import (
    Choice,
    ClassScore,
    Evaluation,
    LayerSpectrum,
    Proof,
    RunSummary,
    Sample,
    to_json,
)

INTENTS = (
    "billing", "cancel_subscription", "delivery_status", "technical_problem",
    "refund_request", "account_access", "product_question", "praise_or_thanks",
)  # fmt: skip


def classification_evaluation(labels: tuple[str, ...], hit_rate: float, loss: float, seed: int = 0) -> Evaluation:
    """Return an evaluation whose scores really follow from its confusion matrix."""
    draw = random.Random(seed)
    size = len(labels)
    confusion = [[0] * size for _ in labels]
    for truth in range(size):
        for _ in range(14 + draw.randrange(8)):
            predicted = truth if draw.random() < hit_rate else draw.randrange(size)
            confusion[truth][predicted] += 1
    classes = []
    for index, label in enumerate(labels):
        hits = confusion[index][index]
        support, predicted = sum(confusion[index]), sum(row[index] for row in confusion)
        precision, recall = hits / predicted if predicted else 0.0, hits / support
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        classes.append(ClassScore(label, precision, recall, f1, support))
    num_rows = sum(map(sum, confusion))
    return Evaluation(
        loss=loss,
        num_rows=num_rows,
        accuracy=sum(confusion[i][i] for i in range(size)) / num_rows,
        macro_f1=sum(score.f1 for score in classes) / size,
        classes=tuple(classes),
        confusion=tuple(map(tuple, confusion)),
    )


def _decaying(draw: random.Random, rank: int) -> list[float]:
    decay = draw.uniform(0.2, 0.7)
    return sorted((draw.uniform(0.6, 1.4) * math.exp(-index * decay) for index in range(rank)), reverse=True)


def bert_like_spectra(num_blocks: int, rank: int, seed: int = 0) -> tuple[LayerSpectrum, ...]:
    """Return decaying singular values for six kinds of layers in every block."""
    draw = random.Random(seed)
    kinds = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "intermediate.dense", "output.dense")  # fmt: skip
    return tuple(
        LayerSpectrum(
            f"encoder.layer.{block}.{kind}",
            tuple(_decaying(draw, rank)),
            base_norm=draw.uniform(18.0, 40.0),
        )
        for block in range(num_blocks)
        for kind in kinds
    )


def made_up_metrics(num_steps: int, first: float, last: float, classes: bool) -> list[dict[str, Any]]:
    """Return a falling loss with noise, evaluated ten times."""
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        part = step / num_steps
        loss = last + (first - last) * math.exp(-6 * part)
        lines.append({
            "kind": "train", "step": step, "epoch": 3 * part, "loss": loss * draw.uniform(0.75, 1.25),
            "lr": 1e-3 * min(1.0, part / 0.06) * (1.0 - part), "grad_norm": draw.uniform(0.5, 2.0),
            "tokens_per_s": 5200.0, "seconds": 0.3 * step,
        })  # fmt: skip
        if step % max(1, num_steps // 10) == 0:
            lines.append({
                "kind": "eval", "step": step, "epoch": 3 * part, "loss": loss * 1.08,
                "accuracy": 1 - math.exp(-5 * part), "perplexity": None if classes else math.exp(loss * 1.08),
            })  # fmt: skip
    return lines


@pytest.fixture(scope="session")
def classification_run() -> tuple[RunSummary, list[dict[str, Any]]]:
    """A finished classification run with every optional part."""
    before = classification_evaluation(INTENTS, 0.03, 2.094, seed=3)
    summary = RunSummary(
        task="classification",
        model="sentence-transformers/all-MiniLM-L6-v2",
        revision=None,
        method={"name": "lora", "rank": 8, "alpha": 16.0, "init": {"name": "kaiming"}, "rank_pattern": {}},
        identity="b7f2a90c41de",
        labels=INTENTS,
        before=before,
        after=classification_evaluation(INTENTS, 0.96, 0.163, seed=4),
        majority=replace(before, loss=2.081, accuracy=0.138, macro_f1=0.0303),
        probe=replace(before, loss=0.402, accuracy=0.893, macro_f1=0.8871),
        num_trainable=740_360,
        num_head=3_080,
        num_base=22_713_216,
        seconds=48.23,
        tokens_per_s=5218.4,
        peak_memory_bytes=222_718_771,
        adapter_bytes=2_974_528,
        num_train_rows=480,
        num_steps=150,
        num_epochs=3.0,
        choices=(
            Choice("task", "classification", "columns 'text' and 'label'"),
            Choice("device", "cpu", "no accelerator found"),
            Choice("targets", "all-linear", "all 36 matrices in the blocks: best quality per number"),
            Choice("rank", "8", "as asked"),
            Choice("learning rate", "0.001", "LoRA at rank 8 on an encoder of 22.7 million numbers"),
            Choice("batch size", "16", "480 rows in 3 epochs give 90 steps or more"),
        ),
        samples=(
            Sample("Why was I charged twice this month?", "billing",
                   "praise_or_thanks (0.14)", "billing (0.98)"),
            Sample("I can't log in after the password reset, the code never comes", "account_access",
                   "billing (0.15)", "account_access (0.97)"),
            Sample("The parcel says delivered but there is nothing here", "delivery_status",
                   "billing (0.14)", "delivery_status (0.96)"),
            Sample("Does the blue one also come in a smaller size?", "product_question",
                   "refund_request (0.13)", "product_question (0.91)"),
            Sample("Send me my money back and close it all", "refund_request",
                   "billing (0.14)", "cancel_subscription (0.52)"),
        ),
        spectra=bert_like_spectra(num_blocks=6, rank=8),
        notes=("2 of 602 rows were longer than 256 tokens and were left out: lines 17, 320.",),
        proof=Proof(True, "9f2c41d0aa1b77e3" * 4, 3.6e-7, 1e-5, True),
        version="0.1.0",
    )  # fmt: skip
    return summary, made_up_metrics(150, 2.1, 0.12, classes=True)


@pytest.fixture(scope="session")
def generation_run(
    classification_run: tuple[RunSummary, list[dict[str, Any]]],
) -> tuple[RunSummary, list[dict[str, Any]]]:
    """A finished generation run: 224 layers, no classes."""
    summary = replace(
        classification_run[0],
        task="generation",
        model="models/tiny-llama-en",
        labels=(),
        before=Evaluation(3.532, 630, num_tokens=20_145, perplexity=math.exp(3.532), accuracy=0.352),
        after=Evaluation(1.301, 630, num_tokens=20_145, perplexity=math.exp(1.301), accuracy=0.674),
        majority=None,
        probe=None,
        num_head=0,
        samples=(
            Sample("name[The Vaults], food[Italian], area[riverside]\nDescribe:",
                   "The Vaults is an Italian place by the riverside.",
                   "The little girl was very happy. She said, \"I want to play\" and then she went on.",
                   "The Vaults serves Italian food in the riverside area."),
        ),
        spectra=tuple(
            replace(spectrum, path=spectrum.path.replace("encoder.layer", "model.layers"))
            for spectrum in bert_like_spectra(num_blocks=38, rank=16)[:224]
        ),
    )  # fmt: skip
    return summary, made_up_metrics(400, 3.5, 1.2, classes=False)


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[RunSummary, list[dict[str, Any]]], Path]:
    """Return a function that writes a run folder and returns it."""

    def write(summary: RunSummary, metrics: list[dict[str, Any]]) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(to_json(summary)), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
        return folder

    return write
