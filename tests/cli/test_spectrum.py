"""``lorakit spectrum`` on runs that were really trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Command, quick

# fp32 singular values, relative to the largest.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def other(place: Path) -> Path:
    """Return the run folder of a second model that answers prompts, with other targets and rank."""
    arguments = ("-o", place / "other", "--max-steps", 2, "--rank", 2, "--targets", "q_proj,v_proj", "--seed", 1)
    done = quick("train", place / "decoder", place / "answers.jsonl", *arguments)
    assert done.code == 0, done.stderr
    return place / "other"


def test_a_trained_runs_values_are_those_of_its_dense_updates(writer: Path) -> None:
    found = quick("spectrum", writer, "--json").json
    tensors = load_file(writer / "adapter_model.safetensors")
    method = found["method"]
    for layer in found["layers"]:
        A, B = (tensors[f"base_model.model.{layer['path']}.lora_{name}.weight"].double() for name in "AB")
        dense = torch.linalg.svdvals(method["alpha"] / method["rank"] * B @ A)[: layer["rank"]]
        assert layer["singular_values"] == pytest.approx(dense.tolist(), abs=TOLERANCE * float(dense[0]))
    assert len(found["layers"]) == 14


def test_the_sizes_are_relative_to_the_base_weights(writer: Path, place: Path) -> None:
    found = quick("spectrum", writer, "--json").json
    weights = load_file(place / "decoder" / "model.safetensors")
    for layer in found["layers"]:
        norm = float(weights[f"{layer['path']}.weight"].norm())
        assert layer["relative_norm"] == pytest.approx(layer["norm"] / norm, rel=1e-4)


def test_a_classifiers_base_is_read_from_its_files(classifier: Path) -> None:
    done = quick("spectrum", classifier, "--json")
    assert done.code == 0, done.stderr
    assert "loading the base" not in done.stderr
    assert all(0 < layer["overlap"]["both"] <= 1 for layer in done.json["layers"])


def test_json_has_what_the_page_on_it_says(writer: Path, other: Path) -> None:
    found = quick("spectrum", writer, "--other", other, "--json").json
    assert set(found) == {"folder", "method", "base", "base_missing", "similarity", "notes", "kinds", "layers"}
    page = (Path(__file__).resolve().parents[2] / "docs" / "spectrum.md").read_text(encoding="utf-8")
    alike, layer = found["similarity"], found["layers"][0]
    parts = (found, layer, layer["overlap"], found["kinds"][0], alike, alike["layers"][0], alike["layers"][0]["at"][0])
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    assert sorted({name for part in parts for name in part} - words) == []


def test_the_table_names_kinds_layers_and_the_other_run(
    writer: Path, other: Path, place: Path, lorakit: Command
) -> None:
    done = lorakit("spectrum", "writer", "--other", "other", "--top", 2, cwd=place)
    assert done.code == 0, done.stderr
    assert "self_attn.q_proj" in done.stdout
    assert "Largest updates, below model.layers" in done.stdout
    assert "Likeness to other" in done.stdout
    assert "10 layers only here" in done.stdout


def test_all_layers_are_listed_where_asked(writer: Path) -> None:
    text = quick("spectrum", writer, "--no-base", "--all").stdout
    assert "All 14 layers, below model.layers" in text


def test_without_the_base_a_line_says_what_is_missing(writer: Path) -> None:
    done = quick("spectrum", writer, "--no-base")
    assert done.code == 0
    assert "note: The base was not read, as asked" in done.stderr
    assert "of base" not in done.stdout


def test_a_picture_is_drawn_and_named(writer: Path, tmp_path: Path) -> None:
    done = quick("spectrum", writer, "--no-base", "--picture", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert f"Picture  {tmp_path / 'layers.png'}" in done.stdout


def test_with_json_nothing_else_is_on_stdout(writer: Path, tmp_path: Path) -> None:
    done = quick("spectrum", writer, "--no-base", "--json", "--picture", tmp_path / "layers.png")
    assert json.loads(done.stdout)["base"] is None


REFUSALS = {
    "no such folder": (("no-such-run",), "there is no run folder"),
    "a model": (("decoder",), "It is a model; give the folder that `lorakit train` wrote"),
    "the other is missing": (("writer", "--other", "wrter"), "Closest: 'writer'"),
    "nothing shared": (("writer", "--other", "classifier"), "share no layer"),
    "another base": (("writer", "--base", "encoder"), "does not fit|belongs to|decoder"),
    "no base of that name": (("writer", "--base", "./no-such-model"), "there is no model folder"),
    "both ways": (("writer", "--base", "decoder", "--no-base"), "say opposite things"),
    "no PNG": (("writer", "--picture", "layers.jpg"), "ends with .png"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_done_is_refused_with_a_reason(
    arguments: tuple[str, ...],
    message: str,
    place: Path,
    writer: Path,
    classifier: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    done = quick("spectrum", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert re.search(message, done.message), done.message
    assert "Traceback" not in done.stderr


def test_the_help_has_an_example() -> None:
    assert "Example: lorakit spectrum runs/first" in " ".join(quick("spectrum", "--help").stdout.split())
