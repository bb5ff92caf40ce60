"""Evaluations when they are due, in full, with answers; early stopping; the best adapter kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.records import Evaluation, from_json
from lorakit.training.fit import FitResult, fit
from lorakit.training.observe import Observer, Step

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]
# The same sums of fp32 numbers, each over the same tensors: gradient checkpointing computes them again.
SAME = 0.0


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [6, 12]),  # 48 rows, 8 at a time: epochs of six steps
        ({"eval_every": 5}, [5, 10, 12]),
        ({"eval_every": 100}, [12]),
        ({"eval_every": 1, "max_steps": 3}, [1, 2, 3]),
    ],
    ids=str,
)
def test_evaluations_are_made_when_they_are_due_and_at_the_end(
    quick_fit: Fit, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    quick_fit(output=tmp_path / "run", **settings)
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == steps


def test_an_evaluation_of_a_classifier_is_written_whole(quick_fit: Fit, tmp_path: Path) -> None:
    result = quick_fit(output=tmp_path / "run")
    for line in lines(tmp_path / "run", "eval"):
        found = from_json(Evaluation, line)
        assert found.macro_f1 is not None
        assert sum(sum(row) for row in found.confusion) == found.num_rows == 12
        assert [score.label for score in found.classes] == list(result.spec.labels)


def test_an_evaluation_of_a_writer_has_perplexity_and_token_accuracy(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("llama", "prompted", output=tmp_path / "run")
    for line in lines(tmp_path / "run", "eval"):
        found = from_json(Evaluation, line)
        assert found.perplexity is not None
        assert found.accuracy is not None
        assert found.num_tokens
        assert found.perplexity > 1


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted"), ("llama", "written")])
def test_an_evaluation_shows_the_same_few_questions_with_the_bases_answers_and_the_new_ones(
    quick_fit: Fit, tmp_path: Path, kind: str, rows: str
) -> None:
    result = quick_fit(kind, rows, output=tmp_path / "run", lr=2e-2, max_steps=20)
    shown = [line["samples"] for line in lines(tmp_path / "run", "eval")]
    asked = [[(sample["input"], sample["expected"], sample["before"]) for sample in each] for each in shown]
    final = {sample.input: sample for sample in result.summary.samples}
    assert 1 <= len(shown[0]) <= 6
    assert all(each == asked[0] for each in asked)
    assert all(final[s["input"]].before == s["before"] for each in shown for s in each if s["input"] in final)
    assert any(sample["after"] != sample["before"] for sample in shown[-1])


class Losses(Observer):
    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, step: Step) -> None:
        self.found.append(step.loss)


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted")])
def test_evaluations_do_not_change_what_is_learned(quick_fit: Fit, kind: str, rows: str) -> None:
    often, once = Losses(), Losses()
    first = quick_fit(kind, rows, observer=often, eval_every=1, method={"name": "lora", "dropout": 0.3})
    second = quick_fit(kind, rows, observer=once, eval_every=12, method={"name": "lora", "dropout": 0.3})
    assert often.found == once.found
    assert first.summary.num_steps == second.summary.num_steps == 12


def unlearnable(rows_of: Rows, count: int = 24) -> list[dict[str, Any]]:
    """Return rows whose labels have nothing to do with the texts: what is learned of them is wrong elsewhere."""
    return [{**row, "label": str(i % 2)} for i, row in enumerate(rows_of("classified", count))]


def test_a_run_ends_early_when_nothing_becomes_better(quick_fit: Fit, rows_of: Rows, tmp_path: Path) -> None:
    settings = {"lr": 3e-2, "epochs": 40, "max_steps": None, "validation": 0.4}
    result = quick_fit("bert", unlearnable(rows_of), output=tmp_path / "run", patience=3, **settings)
    summary, measured = result.summary, lines(tmp_path / "run", "eval")
    best = max(range(len(measured)), key=lambda i: (measured[i]["accuracy"], -measured[i]["loss"], -i))
    assert summary.finished
    assert summary.num_steps < 80
    assert best == len(measured) - 4  # three without a better one after it
    assert any(note.startswith(f"Ended at step {summary.num_steps:,}") for note in summary.notes)
    assert any(f"Kept the adapter of step {measured[best]['step']:,}" in note for note in summary.notes)
    assert (summary.after.accuracy, summary.after.loss) == pytest.approx(
        (measured[best]["accuracy"], measured[best]["loss"]), abs=1e-6
    )


def test_the_choices_say_how_a_run_is_measured_and_ends(quick_fit: Fit) -> None:
    choices = {c.name: c for c in quick_fit(patience=4, schedule="cosine", max_steps=2).summary.choices}
    assert "ends after 4 without a better one" in choices["eval_every"].reason
    assert (choices["optimizer"].value, choices["optimizer"].reason) == (
        "adamw, cosine after 1 step of warm-up",
        "as asked",
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_every_optimizer_learns_at_the_rate_that_is_chosen_for_it(minilm: Path, rows_of: Rows, optimizer: str) -> None:
    summary = fit(minilm, rows_of("classified", 24), optimizer=optimizer, max_steps=12, max_length=16, rank=4).summary
    assert summary.after.loss < 0.98 * summary.before.loss


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted"), ("t5", "prompted")])
def test_gradient_checkpointing_changes_no_loss(quick_fit: Fit, kind: str, rows: str) -> None:
    plain, checkpointed = Losses(), Losses()
    quick_fit(kind, rows, observer=plain, max_steps=5)
    result = quick_fit(kind, rows, observer=checkpointed, max_steps=5, grad_checkpointing=True)
    assert checkpointed.found == pytest.approx(plain.found, abs=SAME)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.model.modules())


@pytest.mark.parametrize(("kind", "rows"), [("bert", "classified"), ("llama", "prompted"), ("t5", "prompted")])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputing_changes_no_bit(quick_fit: Fit, kind: str, rows: str, method: str) -> None:
    plain, less = Losses(), Losses()
    whole = quick_fit(kind, rows, observer=plain, max_steps=5, recompute="off", method=method)
    again = quick_fit(kind, rows, observer=less, max_steps=5, recompute="on", method=method)
    assert less.found == plain.found
    pairs = zip(whole.handle.parameters().values(), again.handle.parameters().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradient_checkpointing_takes_less_memory(quick_fit: Fit) -> None:
    plain, less = (
        quick_fit("llama", "prompted", grad_checkpointing=on, max_steps=1).summary.peak_memory_bytes
        for on in (False, True)
    )
    assert plain is not None
    assert less is not None
    assert less < plain


def test_a_model_without_gradient_checkpointing_is_told(build: Any, tokenizer: Any, rows_of: Rows) -> None:
    model = build("llama")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ConfigError, match="LlamaForCausalLM has no gradient checkpointing"):
            fit(model, rows_of("prompted"), tokenizer=tokenizer("llama"), grad_checkpointing=True)
    finally:
        type(model).supports_gradient_checkpointing = before
