"""Runs whose ranks change on the way end as undisturbed ones when they are interrupted, and are saved as they act."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorakit.errors import TrainingError
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]

STEPS = 12
# The choices end after step 8 of 12; a rank of 2 for each of 14 layers makes 28 components.
ADALORA: dict[str, Any] = {"name": "adalora", "rank": 2, "alpha": 5.0, "init_rank": 4, "tinit": 2, "tfinal": 4}
INCRELORA: dict[str, Any] = {"name": "increlora", "rank": 2, "alpha": 5.0, "tinit": 2, "tfinal": 4, "interval": 2}
DYLORA: dict[str, Any] = {"name": "dylora", "rank": 4, "alpha": 5.0}
# Between two choices, and after all of them.
CASES = [(ADALORA, 6), (ADALORA, 10), (INCRELORA, 6), (DYLORA, 6)]
MERGED = 1e-4  # of logits of about 1: the share that every run's own proof allows in fp32


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


def settings_of(method: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "max_steps": STEPS, "seed": 3, "save_every": 1, "lr": 2e-2, "eval_every": STEPS}


@pytest.fixture(scope="module")
def rows(rows_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of("prompted")), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def wholes(quick_fit: Fit, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitResult]:
    """Return an undisturbed run of each method."""
    place = tmp_path_factory.mktemp("whole")
    methods = (ADALORA, INCRELORA, DYLORA)
    return {m["name"]: quick_fit("llama", str(rows), output=place / m["name"], **settings_of(m)) for m in methods}


@pytest.mark.parametrize(("method", "at"), CASES, ids=[f"{method['name']} at {at}" for method, at in CASES])
def test_a_run_that_broke_off_ends_bit_for_bit_as_an_undisturbed_one(
    method: dict[str, Any], at: int, quick_fit: Fit, rows: Path, wholes: dict[str, FitResult], tmp_path: Path
) -> None:
    whole = wholes[method["name"]].folder
    assert whole is not None
    with pytest.raises(TrainingError, match="power"):
        quick_fit("llama", str(rows), output=tmp_path / "run", observer=Breaks(at), **settings_of(method))
    resume(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    assert len(losses(whole)) == STEPS
    file = "adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("name", ["adalora", "increlora"])
def test_the_saved_adapter_has_exactly_the_components_that_were_asked_for(
    name: str, wholes: dict[str, FitResult]
) -> None:
    folder, updates = wholes[name].folder, wholes[name].handle.updates()
    assert folder is not None
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = [tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key]
    assert sum(ranks) == 2 * len(updates)
    assert len(set(ranks)) > 1
    # Nothing of what was taken away, or held in reserve, is left in the model.
    assert sum(p.numel() for p in wholes[name].handle.parameters().values()) == sum(
        tensor.numel() for tensor in tensors.values()
    ) + sum(ranks)


@pytest.mark.parametrize(("name", "told"), [("adalora", "28 of 56 components kept"), ("increlora", "14 components")])
def test_the_run_says_what_became_of_the_ranks(name: str, told: str, wholes: dict[str, FitResult]) -> None:
    assert any(told in note for note in wholes[name].summary.notes)


@pytest.mark.parametrize("name", ["adalora", "increlora", "dylora"])
def test_a_run_read_again_computes_the_same(name: str, wholes: dict[str, FitResult]) -> None:
    result = wholes[name]
    assert result.folder is not None
    ids = torch.tensor([[6, 11, 12, 7, 1]])
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        assert torch.equal(open_run(result.folder).base.model(input_ids=ids).logits, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what PEFT asks transformers
@pytest.mark.parametrize("name", ["adalora", "increlora", "dylora"])
def test_peft_reads_the_saved_adapter_with_the_same_logits(
    name: str, wholes: dict[str, FitResult], bases: Callable[[str], Path]
) -> None:
    peft = pytest.importorskip("peft")
    result = wholes[name]
    ids = torch.tensor([[6, 11, 12, 7, 1]])
    base = AutoModelForCausalLM.from_pretrained(bases("llama"))
    other = peft.PeftModel.from_pretrained(base, str(result.folder)).eval()
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=0, atol=MERGED)
        with result.handle.disabled():
            assert (result.model(input_ids=ids).logits - expected).abs().max() > 100 * MERGED


@pytest.mark.parametrize("name", ["adalora", "increlora", "dylora"])
def test_every_run_proves_that_merging_changes_nothing(name: str, wholes: dict[str, FitResult]) -> None:
    proof = wholes[name].summary.proof
    assert proof.merged_max_difference <= proof.merged_tolerance
