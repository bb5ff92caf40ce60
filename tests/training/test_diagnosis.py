"""What is wrong with a run is found in its history, named with its rows, and healthy runs are left in peace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import TrainingError
from lorakit.records import Evaluation
from lorakit.training import diagnosis
from lorakit.training.diagnosis import Finding, Seen, Setting
from lorakit.training.fit import FitResult, fit
from lorakit.training.observe import Observer

Fit = Callable[..., FitResult]

FP32 = Setting(lr=1e-3, usual_lr=1e-3, num_steps=100, num_warmup=6, dtype="fp32")
FP16 = Setting(lr=1e-3, usual_lr=1e-3, num_steps=100, num_warmup=6, dtype="fp16")
SLOW = Setting(lr=1e-6, usual_lr=1e-3, num_steps=60, num_warmup=4, dtype="fp32")


def falling(count: int) -> list[Seen]:
    return [Seen(2.0 * 0.98**i + 0.05 * (i % 3), 1.0 + 0.2 * (i % 4), (i,)) for i in range(count)]


def found(history: list[Seen], setting: Setting = FP32) -> dict[str, Finding]:
    """Return everything that is found on the way."""
    each = [f for end in range(1, len(history) + 1) for f in diagnosis.after_step(history[:end], setting)]
    return {finding.name: finding for finding in each}


def test_a_healthy_run_is_left_in_peace() -> None:
    assert found(falling(100)) == {}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_broken_loss_names_step_rows_cause_and_remedy(loss: float) -> None:
    finding = diagnosis.broken_loss(loss, 12, [3, 17], FP32)
    assert finding is not None
    assert finding.fatal
    assert finding.text == (
        f"the loss is {loss} at step 12 (rows 3, 17). The likely cause is a learning rate that is too high "
        "(0.001 here). Try a tenth of it, 0.0001."
    )


def test_a_loss_that_is_broken_from_the_start_is_the_bases() -> None:
    finding = diagnosis.broken_loss(math.nan, 1, [3], FP32)
    assert finding is not None
    assert "the base itself gives it for this batch. Likely causes: a row that is unlike" in finding.text


def test_with_fp16_overflow_is_the_first_suspect() -> None:
    finding = diagnosis.broken_loss(math.inf, 5, [3], FP16)
    assert finding is not None
    assert "fp16 overflow, or a learning rate" in finding.text
    assert diagnosis.broken_gradient(math.inf, 5, [3], FP16) is None


def test_a_finite_loss_and_gradient_are_no_finding() -> None:
    assert diagnosis.broken_loss(1.0, 1, [], FP32) is diagnosis.broken_gradient(1.0, 1, [], FP32) is None


def test_a_loss_of_zero_from_the_start_ends_the_run() -> None:
    finding = found([Seen(0.0, 0.0, (4, 5))] * 3)["zero-loss"]
    assert finding.fatal
    assert "in each of the first 3 steps (at step 3: rows 4, 5)" in finding.text
    assert "every label is masked" in finding.text


def test_a_loss_of_zero_later_is_a_warning() -> None:
    finding = found([*falling(20), Seen(0.0, 0.0, (9,))])["zero-loss"]
    assert not finding.fatal
    assert "exactly 0 at step 21 (row 9)" in finding.text


def test_no_gradient_from_the_start_ends_the_run() -> None:
    finding = found([Seen(1.5, 0.0)] * 3)["zero-gradient"]
    assert finding.fatal
    assert "the adapter does not reach the loss" in finding.text


def test_no_gradient_later_is_a_warning() -> None:
    assert not found([*falling(20), Seen(0.5, 0.0)])["zero-gradient"].fatal


def test_two_steps_without_gradient_are_no_finding() -> None:
    assert found([Seen(1.5, 0.0)] * 2) == {}


def test_fp16_that_always_overflows_is_told() -> None:
    history = [Seen(1.0, math.inf)] * 9
    assert found(history, FP16) == {}
    assert "overflowed in fp16 for 10 steps" in found([*history, Seen(1.0, math.inf)], FP16)["fp16-overflow"].text


def test_a_spike_of_the_gradient_names_its_rows() -> None:
    finding = found([*falling(20), Seen(2.0, 500.0, (31, 32))])["spike"]
    assert "at step 21" in finding.text
    assert "times the usual (rows 31, 32)" in finding.text


def test_a_training_loss_that_rises_is_a_rate_that_is_too_high() -> None:
    finding = found([Seen(1.0 + 0.05 * i, 1.0) for i in range(40)])["rate-too-high"]
    assert "likely too high. Try 0.0001." in finding.text


def test_a_rate_that_is_too_low_is_told_where_nothing_moves() -> None:
    still = [Seen(2.0 - 1e-5 * i, 1.0) for i in range(60)]
    assert "far below the usual 0.001" in found(still, SLOW)["rate-too-low"].text
    assert found(still, FP32) == {}


@pytest.mark.parametrize(("lr", "word"), [(1.0, "1,000 times"), (1e-6, "1/1,000 of")])
def test_a_rate_far_off_is_told_before_the_first_step(lr: float, word: str) -> None:
    finding = diagnosis.rate_far_off(lr, 1e-3)
    assert finding is not None
    assert word in finding.text


def test_a_rate_ten_times_the_usual_is_not_far_off() -> None:
    assert diagnosis.rate_far_off(1e-2, 1e-3) is None


def measured(*losses: float) -> list[tuple[int, Evaluation]]:
    return [(10 * i, Evaluation(loss, 5)) for i, loss in enumerate(losses, start=1)]


def test_a_validation_loss_that_rises_twice_is_told_with_the_best_step() -> None:
    (finding,) = diagnosis.after_evaluation(measured(1.0, 0.8, 0.9, 1.0), FP32)
    assert "0.8 at step 20, 1 at step 40" in finding.text
    assert "--patience" in finding.text


@pytest.mark.parametrize("losses", [(1.0, 0.8), (1.0, 0.8, 0.9), (1.0, 0.8, 0.9, 0.85), (0.8, 0.801, 0.802)], ids=str)
def test_a_validation_loss_that_wavers_is_no_finding(losses: tuple[float, ...]) -> None:
    assert diagnosis.after_evaluation(measured(*losses), FP32) == []


def test_many_rows_are_counted() -> None:
    assert diagnosis.named(range(1, 21)) == "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 8 more"


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_warning_is_shown_once_and_kept_in_summary_and_metrics(quick_fit: Fit, rows_of: Any, tmp_path: Any) -> None:
    # Labels that have nothing to do with the texts: what is learned of them is wrong elsewhere.
    rows = [{**row, "label": str(i % 2)} for i, row in enumerate(rows_of("classified", 24))]
    watch = Notes()
    result = quick_fit(
        "bert", rows, observer=watch, lr=2e-2, epochs=30, max_steps=None, validation=0.4, output=tmp_path / "run"
    )
    live = [note for note in watch.notes if "the validation loss rises" in note]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(live) == 1
    assert live[0] in result.summary.notes
    assert [line["text"] for line in lines if line["kind"] == "warning" and line["name"] == "overfitting"] == live


def test_a_rate_far_off_is_told_by_fit(quick_fit: Fit) -> None:
    watch = Notes()
    quick_fit(observer=watch, lr=1e-6, max_steps=1)
    assert any("is 1/1,000 of the usual 0.001" in note for note in watch.notes)


class Silent(nn.Module):
    """Lets nothing through, and gradients of zero back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0


class Cut(nn.Module):
    """Lets no gradient back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


@pytest.mark.parametrize(
    ("before_head", "message"),
    [(Silent, "gradient is exactly 0 in each of the first 3 steps"), (Cut, "the loss does not depend on the adapter")],
)
def test_an_adapter_that_does_not_reach_the_loss_ends_the_run(
    build: Any, tokenizer: Any, rows_of: Any, before_head: type[nn.Module], message: str
) -> None:
    model = build("llama")
    model.lm_head = nn.Sequential(before_head(), nn.Linear(32, 34))
    with pytest.raises(TrainingError, match=message):
        fit(model, rows_of("prompted"), tokenizer=tokenizer("llama"), targets="q_proj", max_steps=5)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("train", r"the loss is nan at step \d \(rows [\d, ]*21[\d, ]*\)"),
        ("held", r"the untouched base on the validation rows is nan \(row 21\)"),
    ],
)
def test_a_row_that_breaks_the_base_is_named(
    build: Any, tokenizer: Any, rows_of: Any, tmp_path: Any, place: str, message: str
) -> None:
    model, words = build("llama"), tokenizer("llama")
    sets = {"train": rows_of("prompted", 20), "held": rows_of("prompted", 20, seed=1)}
    sets[place].append({"prompt": "sky user", "completion": "grey"})
    (tmp_path / "held.json").write_text(json.dumps(sets["held"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[words.convert_tokens_to_ids("user")] = math.nan
    settings = {"validation": str(tmp_path / "held.json"), "max_steps": 10, "batch_size": 4}
    with pytest.raises(TrainingError, match=message):
        fit(model, sets["train"], tokenizer=words, **settings)
