"""Runs whose start or ranks come from the training rows: the same again on resuming, and in every process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.adapters import handle_of
from lorakit.errors import InputError, TrainingError
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step

from .test_processes import LOSS_TOLERANCE, do, lines

Fit = Callable[..., FitResult]
Rows = Callable[..., list[dict[str, Any]]]
Bases = Callable[[str], Path]

METHODS: dict[str, dict[str, Any]] = {
    "loraga": {"rank": 3, "alpha": 8, "init": "loraga"},
    "loraone": {"rank": 3, "alpha": 8, "init": "loraone"},
    "eva": {"rank": 3, "alpha": 8, "init": "eva"},
    "corda": {"rank": 3, "alpha": 8, "init": "corda"},
    "auto": {"rank": "auto", "budget": 2000, "alpha": 8},
    "auto, loraga": {"rank": "auto", "budget": 2000, "alpha": 8, "init": "loraga"},
    "auto by inputs": {"rank": "auto", "budget": 2000, "alpha": 8, "rank_by": "inputs"},
}
SETTINGS = {"max_steps": 6, "micro_batch": 4, "batch_size": 8}


class Breaks(Observer):
    """Ends the run at a step, as a lost connection would."""

    def step(self, step: Step) -> None:
        if step.step == 4:
            raise TrainingError("the power went out")


def fields(name: str) -> dict[str, Any]:
    return {"name": "lora", **METHODS[name]}


ALWAYS = ("loraga", "auto by inputs")


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_a_resumed_run_ends_with_the_same_adapter_byte_for_byte(
    name: str, quick_fit: Fit, rows_of: Rows, tmp_path: Path
) -> None:
    rows, settings = rows_of("prompted"), {**SETTINGS, "method": fields(name), "save_every": 1}
    quick_fit("llama", rows, output=tmp_path / "whole", **settings)
    with pytest.raises(TrainingError, match="power"):
        quick_fit("llama", rows, output=tmp_path / "broken", observer=Breaks(), **settings)
    resume(tmp_path / "broken", rows=rows)
    whole, resumed = ((tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("whole", "broken"))
    assert resumed == whole


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", ["loraga", "auto by inputs"])
def test_other_kinds_of_models_are_looked_at_too(kind: str, name: str, quick_fit: Fit) -> None:
    rows = "classified" if kind == "bert" else "prompted"
    result = quick_fit(kind, rows, **{**SETTINGS, "max_steps": 2}, method=fields(name))
    assert result.summary.after.loss != result.summary.before.loss


def test_the_run_says_which_ranks_were_chosen(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("llama", "prompted", output=tmp_path / "run", method=fields("auto"), **SETTINGS)
    choices = json.loads((tmp_path / "run" / "start.json").read_text())["choices"]
    found = next(choice for choice in choices if choice["name"] == "ranks")
    assert re.fullmatch(r"1 to \d+, mean \d\.\d, in \d+ layers(; \d+ left alone)?", found["value"])
    assert "by the layers' gradient: 1," in found["reason"]
    assert "of 2,000 numbers, most in model.layers." in found["reason"]


def test_the_config_of_a_run_asks_for_the_budget_again(quick_fit: Fit, tmp_path: Path) -> None:
    import yaml

    quick_fit("llama", "prompted", output=tmp_path / "run", method=fields("auto"), **SETTINGS)
    method = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]
    assert (method["rank"], method["budget"]) == ("auto", 2000)


def test_the_base_is_measured_and_trained_as_it_was(quick_fit: Fit) -> None:
    plain = quick_fit("llama", "prompted", **SETTINGS)
    looked = quick_fit("llama", "prompted", method=fields("loraga"), **SETTINGS)
    assert looked.summary.before.loss == plain.summary.before.loss


def starts(result: FitResult) -> dict[str, Tensor]:
    handle = handle_of(result.model)
    assert handle is not None
    return {path: u.A0 for path, u in handle.updates().items() if isinstance(u, LowRankUpdate) and u.A0 is not None}


def test_the_rows_that_are_looked_at_follow_from_the_seed(quick_fit: Fit) -> None:
    settings = {**SETTINGS, "max_steps": 1, "method": {**fields("loraga"), "init": {"name": "loraga", "rows": 4}}}
    first, again, other = (starts(quick_fit("llama", "prompted", seed=seed, **settings)) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[path]) for path, tensor in first.items())
    assert any(not torch.equal(tensor, other[path]) for path, tensor in first.items())


def test_a_budget_that_cannot_be_met_is_refused_before_training(quick_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="budget 10 is below the"):
        quick_fit("llama", "prompted", output=tmp_path / "run", method={**fields("auto"), "budget": 10}, **SETTINGS)


@pytest.fixture(scope="module")
def shared_job(bases: Bases, rows_of: Rows, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that makes a job for one or more processes."""
    place = tmp_path_factory.mktemp("calibrated")
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of("prompted", 23)), encoding="utf-8")

    def make(output: Path, name: str) -> dict[str, Any]:
        settings = {"max_steps": 4, "lr": 5e-3, "batch_size": 5, "micro_batch": 2, "validation": 0.2, "seed": 1}
        given = {**settings, "method": fields(name), "output": str(output)}
        return {"model": str(bases("llama")), "data": str(data), "settings": given}

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto, loraga", "auto by inputs"])
def test_two_processes_start_and_learn_as_one_does(
    name: str, shared_job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for count in (1, 2):
        done = do(count, tmp_path, shared_job(tmp_path / f"run-{count}", name))
        assert done.returncode == 0, done.stderr
    alone, together = (lines(tmp_path / f"run-{count}", "train") for count in (1, 2))
    assert [line["loss"] for line in together] == pytest.approx(
        [line["loss"] for line in alone], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE
    )


def test_the_method_that_a_run_shows_has_all_its_ranks(quick_fit: Fit) -> None:
    result = quick_fit("llama", "prompted", method=fields("auto"), **SETTINGS)
    method = result.handle.entry("default").method
    assert isinstance(method, LoRA)
    assert isinstance(method.rank, int)
