"""What the command line says of itself, without doing anything."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from lorakit.cli.main import app
from lorakit.inits import init_names
from lorakit.methods import method_names
from lorakit.version import __version__

COMMANDS = (
    *(
        "train",
        "resume",
        "preview",
        "plan",
        "eval",
        "predict",
        "generate",
        "chat",
        "merge",
        "inspect",
        "spectrum",
        "compress",
        "methods",
    ),
    *("demo", "demo text", "demo digits"),
)
TRAIN_OPTIONS = [
    "task",
    "method",
    "rank",
    "alpha",
    "init",
    "budget",
    "targets",
    "exclude",
    "layers",
    "train-modules",
    "epochs",
    "max-steps",
    "lr",
    "batch-size",
    "micro-batch",
    "validation",
    "max-length",
    "dtype",
    "device",
    "seed",
    "optimizer",
    "schedule",
    "warmup",
    "weight-decay",
    "clip-norm",
    "eval-every",
    "patience",
    "save-every",
    "keep",
    "cache-prefix",
    "grad-checkpointing",
    "compile",
    "revision",
    "trust-remote-code",
    "output",
    "force",
    "json",
    "config",
]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_an_example(command: str) -> None:
    text = shown(*command.split(), "--help")
    assert "--json" in text
    assert f"Example: lorakit {command}" in text or command == "demo"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_example_is_one_that_parses(command: str) -> None:
    words = shlex.split(shown(*command.split(), "--help").rpartition("Example: lorakit ")[2])
    assert shown(*words, "--help").startswith(f"Usage: lorakit {words[0]}")


@pytest.mark.parametrize("option", TRAIN_OPTIONS)
def test_train_has_the_option(option: str) -> None:
    assert f" --{option} " in shown("train", "--help")


def test_help_names_every_command() -> None:
    text = shown("--help")
    assert [command for command in COMMANDS if command.split()[0] not in text] == []


def test_version_is_the_packages() -> None:
    assert shown("--version") == f"lorakit {__version__}"


def test_methods_are_listed_with_their_settings() -> None:
    text = shown("methods")
    assert "lora" in text
    assert "rank" in text


def test_every_start_is_listed_too() -> None:
    found = json.loads(shown("methods", "--json"))
    assert {entry["name"] for entry in found["inits"]} == set(init_names())
    assert {entry["name"] for entry in found["methods"]} == set(method_names())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["trian"], "Did you mean 'train'"), (["train", "--rnk", "4"], "--rank")],
    ids=["name", "option"],
)
def test_a_mistyped_word_is_answered_with_the_nearest(arguments: list[str], hint: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert result.stdout == ""
