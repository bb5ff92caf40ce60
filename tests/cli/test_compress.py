"""``lorakit compress`` on runs that were really trained, and ``--init`` of ``lorakit train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from .conftest import quick

# Predicted from fp64 squares, measured of pairs in fp32.
ERROR = 1e-5


@pytest.fixture(scope="session")
def principal(place: Path) -> Path:
    """Return the run folder of a classifier that started from the principal part of its weights."""
    settings = ("--init", "pissa", "--rank", 4, "--lr", 0.02, "--epochs", 5)
    done = quick("train", place / "encoder", place / "opinions.jsonl", "-o", place / "principal", *settings)
    assert done.code == 0, done.stderr
    return place / "principal"


@pytest.fixture(scope="session")
def small(principal: Path, place: Path) -> Path:
    """Return a compressed run folder of the same."""
    done = quick("compress", principal, "--energy", 0.9, "-o", place / "small", "--json")
    assert done.code == 0, done.stderr
    return place / "small"


def test_the_init_is_in_the_settings_of_the_run(principal: Path) -> None:
    settings = yaml.safe_load((principal / "config.yaml").read_text(encoding="utf-8"))
    assert settings["method"]["init"] == {"name": "pissa", "steps": None}
    assert "init" not in settings


def test_the_adapter_of_such_a_run_is_a_plain_one_of_twice_the_rank(principal: Path) -> None:
    config = json.loads((principal / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 32, True)


def test_an_unknown_init_is_named_with_the_nearest_one(place: Path) -> None:
    done = quick("train", place / "encoder", place / "opinions.jsonl", "--init", "pisa", "-o", place / "none")
    assert done.code == 2
    assert "no init 'pisa'" in done.message
    assert "'pissa'" in done.message


def test_the_predicted_error_is_the_measured_one(small: Path) -> None:
    found = json.loads((small / "compressed.json").read_text(encoding="utf-8"))
    assert found["energy_kept"] >= 0.9
    assert found["measured_error"] == pytest.approx(found["predicted_error"], rel=ERROR)
    assert found["bytes_after"] == (small / "adapter_model.safetensors").stat().st_size < found["bytes_before"]
    tensors = load_file(small / "adapter_model.safetensors")
    assert found["numbers_after"] == sum(t.numel() for name, t in tensors.items() if ".lora_" in name)


def test_it_is_used_like_the_run(small: Path, principal: Path, place: Path) -> None:
    before, after = (quick("eval", run, place / "test.jsonl", "--json") for run in (principal, small))
    assert after.code == 0, after.stderr
    assert after.json["accuracy"] >= before.json["accuracy"] - 0.1


def test_it_merges(small: Path, tmp_path: Path) -> None:
    done = quick("merge", small, tmp_path / "merged")
    assert done.code == 0, done.stderr
    assert "gives the same outputs" in done.stdout


def test_the_base_it_belongs_to_is_kept(small: Path, principal: Path, place: Path) -> None:
    from lorakit.formats import read_adapter

    assert read_adapter(small).identity == read_adapter(principal).identity
    done = quick("eval", small, place / "test.jsonl", "--base", place / "decoder")
    assert done.code != 0


def test_its_ranks_are_those_that_spectrum_reads(small: Path) -> None:
    found = quick("spectrum", small, "--json").json
    cut = json.loads((small / "compressed.json").read_text(encoding="utf-8"))["layers"]
    kept = {layer["path"]: layer["rank_after"] for layer in cut if layer["rank_after"]}
    assert {layer["path"]: layer["rank"] for layer in found["layers"]} == kept


def test_a_run_with_new_tokens_keeps_them(place: Path, tmp_path: Path) -> None:
    settings = ("--add-tokens", "blip,blop", "--max-steps", 2)
    trained = quick("train", place / "decoder", place / "answers.jsonl", "-o", tmp_path / "run", *settings)
    assert trained.code == 0, trained.stderr
    done = quick("compress", tmp_path / "run", "--rank", 2, "-o", tmp_path / "cut")
    assert done.code == 0, done.stderr
    again = quick("generate", tmp_path / "cut", "what is blip", "--max-new-tokens", 3)
    assert again.code == 0, again.stderr


def test_a_bare_peft_folder_is_cut_as_well(writer: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((writer / name).read_bytes())
    done = quick("compress", bare, "--rank", 2, "-o", tmp_path / "cut")
    assert done.code == 0, done.stderr
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["task_type"]) == (2, "CAUSAL_LM")


def test_the_table_fits_80_columns(principal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = quick("compress", principal, "--budget", 900, "-o", tmp_path / "cut")
    assert done.code == 0, done.stderr
    lines = done.stdout.split("\nFile")[0].splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any(line.startswith("all ") for line in lines)
    assert "predicted" in lines[0]


def taken(folder: Path) -> list[Any]:
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("mine")
    return ["--rank", 2, "-o", folder / "taken"]


REFUSED: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "nothing asked": (lambda folder: ["-o", folder / "x"], "none is given"),
    "two asked": (lambda folder: ["--rank", 2, "--budget", 9, "-o", folder / "x"], "--budget and --rank are given"),
    "a place that is taken": (taken, "exists already"),
    "nothing to cut": (lambda folder: ["--energy", 1, "-o", folder / "x"], "nothing would be cut"),
    "too small a budget": (lambda folder: ["--budget", 5, "-o", folder / "x"], "below one component"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_says_why_and_leaves_nothing(
    writer: Path, tmp_path: Path, arguments: Callable[[Path], list[Any]], message: str
) -> None:
    words = arguments(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = quick("compress", writer, *words)
    assert done.code == 2
    assert message in done.message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    done = quick("compress", tmp_path / "nowhere", "--rank", 1, "-o", tmp_path / "x")
    assert done.code == 2
    assert "there is no run folder" in done.message
