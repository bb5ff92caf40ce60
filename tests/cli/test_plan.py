"""``lorakit plan``: side by side, with a real step beside the estimate, and from a config alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lorakit.cli import plan
from lorakit.cli.main import Commands

KINDS = ["full", "head", "lora", "lora, checkpointing", "lora, 4-bit base"]
CLOSE = 0.15
"""What the command promises of its estimate."""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Run:
    """Return a function that runs ``lorakit plan`` in this process."""
    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, context_settings={"terminal_width": 80})
    app.callback()(lambda: None)
    plan.register(app)
    return lambda *words: CliRunner().invoke(app, ["plan", *(str(word) for word in words)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def found(run: Run, place: Path) -> dict[str, Any]:
    """Return a plan of the decoder as JSON."""
    done = run(place / "decoder", place / "answers.jsonl", "--memory", "1GB", "--memory", "1MB", "--json")
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_kinds_of_training_stand_side_by_side(found: dict[str, Any]) -> None:
    assert [column["name"] for column in found["columns"]] == KINDS


def test_the_probe_is_beside_the_estimate(found: dict[str, Any]) -> None:
    measured = found["measured"]
    assert measured["estimated_bytes"] == pytest.approx(measured["measured_bytes"], rel=CLOSE)


def test_cards_are_counted_for_each_size(found: dict[str, Any]) -> None:
    lora = {entry["card_bytes"]: entry["num_cards"] for entry in found["fits"] if entry["column"] == "lora"}
    assert lora == {10**9: 1, 10**6: 1}


def test_the_output_fits_80_columns_and_says_what_to_run(run: Run, place: Path) -> None:
    settings = ("--rank", 4, "--batch-size", 8)
    done = run(place / "decoder", place / "answers.jsonl", *settings, "--no-probe", "--memory", "110kB")
    assert done.exit_code == 0, done.stderr
    table, _, command = done.stdout.partition("\nNext\n")
    assert max(map(len, table.splitlines())) <= 80
    assert command.strip().startswith(
        f"lorakit train {place / 'decoder'} {place / 'answers.jsonl'} --rank 4 --batch-size 8"
    )
    assert "--micro-batch" in command
    assert "--recompute on" in command
    assert "recompute is on" in table


def test_a_config_alone_is_enough(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "encoder" / "config.json", tmp_path / "config.json")
    done = run(tmp_path / "config.json", "--length", 16, "--rows", 40, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["measured"] is None
    assert any("weights are not here" in note for note in value["notes"])
    assert value["seconds"] > 0


def test_rows_without_a_tokenizer_are_refused_with_what_to_do(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "decoder" / "config.json", tmp_path / "config.json")
    done = run(tmp_path, place / "answers.jsonl")
    assert done.exit_code == 2
    assert "--length" in done.stderr


@pytest.mark.parametrize("words", [("--length", 4000), (), ("--length", 8, "--memory", "much")])
def test_what_cannot_be_planned_is_refused(run: Run, place: Path, words: tuple[object, ...]) -> None:
    assert run(place / "decoder", *words).exit_code == 2
