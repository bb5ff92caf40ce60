"""What a run shows while it goes, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorakit.cli import output, progress
from lorakit.cli.progress import Watch
from lorakit.records import Evaluation
from lorakit.training.observe import Step

NUM_STEPS = 200


def go(watch: Watch, until: int = NUM_STEPS) -> None:
    with watch:
        watch.stage("loading the model")
        watch.stage("training")
        for number in range(1, until + 1):
            watch.step(Step(number, NUM_STEPS, number / 50, 2.0, 1e-3, 1.0, 1234.0, float(number)))
        watch.evaluation(until, 4.0, Evaluation(0.5, 10, accuracy=0.875), True)
        watch.training_ends()


def test_without_a_terminal_a_line_is_printed_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    go(Watch())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert captured.out == ""
    assert lines[0] == "loading the model"
    assert len(steps) == progress.PLAIN_LINES + 1
    assert steps[-1] == "step 200 of 200  loss 2.000  lr 1.0e-03  1,234 tokens/s  0:00 left"
    assert lines[-1] == "epoch 4: validation loss 0.500, accuracy 87.5 % (best so far)"


def test_the_adapter_counts_as_saved_once_the_next_stage_begins() -> None:
    watch = Watch()
    seen = []
    for stage in ("training", "saving the adapter", "measuring the adapted model", "drawing"):
        watch.stage(stage)
        seen.append(watch.adapter_saved)
    assert seen == [False, False, True, True]


def test_an_early_end_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    go(Watch(), until=7)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted after step 7 of 200"


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_a_bar_shows_loss_rate_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(output, "progress", lambda: console)
    go(Watch(), until=100)
    text = screen.getvalue()
    for part in ("100/200", "loss 2.000", "lr 1.0e-03", "1,234 tokens/s", "1:40 left"):
        assert part in text
    assert "…" not in text


def test_the_bar_takes_over_from_the_stage_and_both_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(output, "progress", lambda: console)
    watch = Watch()
    go(watch, until=3)
    assert (watch._status, watch._bar) == (None, None)
