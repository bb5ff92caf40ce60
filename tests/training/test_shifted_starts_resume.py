"""Runs whose pairs start from the base's weights: trained, interrupted, gone on with, saved and used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.errors import TrainingError
from lorakit.methods.lora import LowRankUpdate
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]


class Breaks(Observer):
    """Fails at a step, as a machine does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            raise TrainingError("broken off")


@pytest.fixture
def source(tmp_path: Path, rows_of: Callable[..., list[dict[str, Any]]]) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of("classified")), encoding="utf-8")
    return file


RUNS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "pissa, fast": {"init": {"name": "pissa", "steps": 1}, "rank": 4},
    "dora": {"method": "dora", "init": "pissa", "weight_decay": 0.1},
    "olora, bf16 base": {"init": "olora", "dtype": "bf16"},
    "milora, dropout and biases": {"method": {"name": "lora", "init": "milora", "dropout": 0.2, "bias": "lora_only"}},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_an_interrupted_run_goes_on_to_the_last_bit(
    quick_fit: Fit, source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    fixed = {"max_steps": 7, "eval_every": 2, "save_every": 2, "lr": 0.05, **settings}
    whole = quick_fit("bert", str(source), output=tmp_path / "whole", **fixed)
    with pytest.raises(TrainingError, match="broken off"):
        quick_fit("bert", str(source), output=tmp_path / "run", observer=Breaks(5), **fixed)
    again = resume(tmp_path / "run")
    for path, update in whole.handle.updates().items():
        mine = again.handle.updates()[path]
        assert isinstance(update, LowRankUpdate)
        assert isinstance(mine, LowRankUpdate)
        assert all(torch.equal(getattr(mine, name), getattr(update, name)) for name in ("A", "B", "A0", "B0"))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["pissa", "dora", "olora, bf16 base"])
def test_the_saved_run_is_the_trained_model(quick_fit: Fit, source: Path, tmp_path: Path, name: str) -> None:
    trained = quick_fit("bert", str(source), max_steps=6, output=tmp_path / "run", **RUNS[name])
    opened = open_run(tmp_path / "run")
    inputs = {"input_ids": torch.randint(6, 20, (3, 8), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert torch.equal(opened.base.model(**inputs).logits, trained.model.eval()(**inputs).logits)
