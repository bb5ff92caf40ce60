"""What a run shows while it goes, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from lorakit.cli import live, output, progress
from lorakit.cli.live import Figures, Panel
from lorakit.cli.machine import JsonWatch
from lorakit.cli.progress import Watch
from lorakit.records import Choice, Evaluation, Planned
from lorakit.training.observe import About, Step

NUM_STEPS = 200
ABOUT = About(
    task="generation",
    model="org/some-model",
    num_base=7_240_000_000,
    dtype="bfloat16",
    device="cpu",
    method={"name": "lora", "rank": 8, "alpha": 16.0},
    targets=("q_proj", "v_proj"),
    num_trainable=1_234_567,
    num_head=0,
    num_rows=480,
    num_held=48,
    num_tokens=98_765,
    batch_size=16,
    micro_batch=4,
    num_steps=NUM_STEPS,
    epochs=6.67,
    folder="runs/mine",
    planned=Planned(NUM_STEPS, memory={"weights": 10 * 2**30, "activations": 3 * 2**20}, seconds=75.0),
)


def steps(until: int, num_steps: int = NUM_STEPS, seconds: float = 1.0) -> list[Step]:
    return [
        Step(n, num_steps, n / 50, 2.0 - n / num_steps, 1e-3, 1.0, 1234.0, seconds * n) for n in range(1, until + 1)
    ]


def go(watch: Watch, until: int = NUM_STEPS) -> None:
    with watch:
        watch.stage("loading the model")
        watch.begins(ABOUT)
        watch.stage("training")
        for step in steps(until):
            watch.step(step)
        watch.evaluation(until, 4.0, Evaluation(0.5, 10, accuracy=0.875), True)
        watch.training_ends()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes stderr a terminal of some width, and what is written to it."""

    def make(width: int) -> io.StringIO:
        written = io.StringIO()
        console = Console(file=written, force_terminal=True, width=width, color_system=None, legacy_windows=False)
        monkeypatch.setattr(output, "progress", lambda: console)
        return written

    return make


def drawn(width: int) -> list[str]:
    """Return the lines of the panel after 100 steps and two evaluations."""
    figures = Figures(device="cpu")
    for step in steps(100):
        figures.add(step)
    figures.held_out += [2.0, 1.5]
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=True, legacy_windows=False)
    console.print(Panel(figures))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_without_a_terminal_a_line_is_printed_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    go(Watch())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    told = [line for line in lines if line.startswith("step ")]
    assert captured.out == ""
    assert lines[0] == "loading the model"
    assert len(told) == progress.PLAIN_LINES + 1
    assert told[-1].startswith("step 200 of 200  loss 1.022 (falling)  lr 1.0e-03  1,234 tokens/s  peak ")
    assert told[-1].endswith(" GiB  0:00 left")
    assert lines[-1] == "epoch 4: validation loss 0.500, accuracy 87.5 % (best so far)"


def test_a_long_run_without_a_terminal_prints_some_fifty_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    watch = Watch()
    for step in steps(2000, 2000, seconds=30.0):
        now[0] += 30.0
        watch.step(step)
    told = capsys.readouterr().err.splitlines()
    assert progress.PLAIN_LINES < len(told) <= progress.PLAIN_LINES + progress.PATIENT_LINES + 1


def test_the_header_says_what_is_trained_on_what(capsys: pytest.CaptureFixture[str]) -> None:
    Watch().begins(ABOUT)
    assert capsys.readouterr().err.splitlines() == [
        "model: org/some-model: 7.24 G numbers, bfloat16 on cpu",
        "method: LoRA rank 8, alpha 16: 1,234,567 numbers trained, 0.017 % of the base",
        "on: q_proj, v_proj",
        "data: 480 rows, 98,765 tokens an epoch, 16 a step, 4 at a time; 48 held out",
        "run: 200 steps, 6.67 epochs, into runs/mine",
        "plan: 3.00 MiB above the model, about 1 min 15 s",
    ]


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


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_shows_every_figure_within_the_width(width: int) -> None:
    lines = drawn(width)
    text = "\n".join(lines)
    expected = ("100/200", "50 %", "passed, 1:40 left", "loss 1.522 ↓", "val 1.500 ↓", "lr 1.0e-03", "1,234 tokens/s")
    assert [part for part in (*expected, "GiB") if part not in text] == []
    assert max(map(len, lines)) <= width
    assert "…" not in text


@pytest.mark.parametrize(("width", "height"), [(60, 3), (80, 2), (120, 2)])
def test_the_panel_takes_as_few_lines_as_it_needs(width: int, height: int) -> None:
    assert len(drawn(width)) == height


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_header_bar_and_evaluations_are_shown(screen: Any, width: int) -> None:
    written = screen(width)
    go(Watch())
    text = written.getvalue()
    assert [part for part in ("method  LoRA", "200/200", "validation loss 0.500") if part not in text] == []


def test_the_bar_takes_over_from_the_stage_and_both_go_away(screen: Any) -> None:
    screen(100)
    watch = Watch()
    go(watch, until=3)
    assert (watch._status, watch._bar) == (None, None)


def interrupted(watch: Watch) -> None:
    with watch:
        watch.step(steps(1)[0])
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_cursor_visible(screen: Any) -> None:
    written = screen(80)
    watch = Watch()
    with pytest.raises(KeyboardInterrupt):
        interrupted(watch)
    text = written.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("losses", "direction"),
    [
        ([2.0] * 20, ""),
        ([2.0] * 10 + [1.5] * 10, "falls"),
        ([1.5] * 10 + [2.0] * 10, "rises"),
        ([2.0, 1.0], ""),
        ([2.0, 2.0, 1.0, 1.0], "falls"),
    ],
)
def test_the_direction_compares_the_last_steps_with_those_before(losses: list[float], direction: str) -> None:
    figures = Figures()
    for n, loss in enumerate(losses, start=1):
        figures.add(Step(n, 100, 0.1, loss, 1e-3, 1.0, 1.0, float(n)))
    assert figures.direction == direction


def test_the_peak_memory_is_this_process_s_in_bytes() -> None:
    block = bytearray(b"x") * (64 * 2**20)
    assert (live.peak_memory("cpu") or 0) > len(block)


def test_a_quiet_watch_says_nothing_but_remarks(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(quiet=True)
    watch.note("the loss rises")
    go(watch)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "note: the loss rises\n")


def test_events_are_lines_of_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    watch = JsonWatch()
    watch.choices([Choice("rank", "8", "as asked")])
    watch.note("the loss rises")
    go(watch, until=2)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    kinds = ["setting", "note", "stage", "begins", "stage", "train", "train", "eval", "ends"]
    assert [line["kind"] for line in lines] == kinds
    assert (lines[3]["model"], lines[6]["step"], lines[7]["loss"]) == ("org/some-model", 2, 0.5)
    assert lines[-1] == {"kind": "ends", "step": 2, "interrupted": True}
