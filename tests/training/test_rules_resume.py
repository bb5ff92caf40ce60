"""A run with a method that has a rule of its own goes on after an interruption as if there had been none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorakit.errors import TrainingError
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step

Fit = Callable[..., FitResult]

# Those that change rates or gradients, on a start at zero and on one from the weight.
METHODS: dict[str, dict[str, Any]] = {
    "loraplus": {"name": "lora+", "ratio": 4, "dropout": 0.1},
    "lorafa": {"name": "lorafa", "init": "pissa"},
    "lorapro": {"name": "lorapro", "init": "pissa"},
}


class Breaks(Observer):
    """Ends the run at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            raise TrainingError("the power went out")


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_run_that_broke_off_ends_bit_for_bit_as_an_undisturbed_one(
    method: dict[str, Any], quick_fit: Fit, rows_of: Callable[..., Any], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of("prompted")), encoding="utf-8")
    settings = {"method": {"rank": 3, "alpha": 5, **method}, "max_steps": 3, "seed": 3, "save_every": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quick_fit("llama", str(rows), output=whole, **settings)
    with pytest.raises(TrainingError, match="power"):
        quick_fit("llama", str(rows), output=broken, observer=Breaks(3), **settings)
    resume(broken)
    assert losses(broken) == losses(whole)
    assert len(losses(whole)) == 3
    file = "adapter_model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(whole / file).items() if "lora_B" in name)
