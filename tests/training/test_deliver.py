"""Merging a run: the plain folder gives the adapted model's outputs, or nothing is written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lorakit.bases import save_model
from lorakit.errors import ConfigError, MergeToleranceError, RunFolderError
from lorakit.training.deliver import divergence, merge_run
from lorakit.training.fit import FitResult
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]
IDS = torch.tensor([[5, 6, 7, 8, 1]])
# One merged product in fp32 instead of two: sums of some dozen terms in another order.
MERGED = 1e-5


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits(model: Any, kind: str = "llama") -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}
    found: torch.Tensor = model.eval()(input_ids=IDS, **more).logits
    return found.float()


@pytest.fixture(scope="module")
def writer(quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a trained writer."""
    out = tmp_path_factory.mktemp("runs") / "writer"
    quick_fit("llama", "prompted", max_steps=20, lr=2e-2, output=out)
    return out


AUTO = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", AUTO)
def test_the_merged_folder_loads_in_transformers_with_the_same_outputs(
    quick_fit: Fit, tmp_path: Path, kind: str, method: str
) -> None:
    rows = "classified" if kind == "bert" else "prompted"
    result = quick_fit(kind, rows, max_steps=10, lr=2e-2, method=method, output=tmp_path / "run")
    report = merge_run(tmp_path / "run", tmp_path / "model")
    model = AUTO[kind].from_pretrained(tmp_path / "model")

    torch.testing.assert_close(logits(model, kind), logits(result.model, kind), rtol=MERGED, atol=MERGED)
    assert report.max_difference <= report.tolerance
    assert (report.dtype, report.rounding_top1, report.reloaded) == ("fp32", 1.0, True)
    assert report.rounding_kl == pytest.approx(0.0, abs=1e-6)
    assert not [name for name in load_file(tmp_path / "model" / "model.safetensors") if "lorakit" in name]


def test_a_merged_classifier_knows_its_classes(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("gpt2", "classified", max_steps=2, output=tmp_path / "run")
    report = merge_run(tmp_path / "run", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert report.reloaded


def test_a_merged_t5_classifier_is_probed_and_loads_again(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("t5", "classified", max_steps=2, output=tmp_path / "run")
    assert merge_run(tmp_path / "run", tmp_path / "model").reloaded


def test_the_tokenizer_comes_along(writer: Path, tmp_path: Path) -> None:
    merge_run(writer, tmp_path / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert words("the red house")["input_ids"] == open_run(writer).base.tokenizer("the red house")["input_ids"]


def test_tied_weights_that_part_are_untied_in_the_config(quick_fit: Fit, tmp_path: Path) -> None:
    result = quick_fit(
        "llama-tied", "prompted", max_steps=20, lr=2e-2, targets=["q_proj", "lm_head"], output=tmp_path / "run"
    )
    report = merge_run(tmp_path / "run", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    assert report.untied == ("lm_head.weight",)
    assert config["tie_word_embeddings"] is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(model), logits(result.model), rtol=MERGED, atol=MERGED)


def test_tied_weights_that_nobody_trained_stay_tied(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("llama-tied", "prompted", max_steps=2, output=tmp_path / "run")
    report = merge_run(tmp_path / "run", tmp_path / "model")
    assert report.untied == ()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {str(opened.get_slice(key).get_dtype()) for key in opened.keys()}  # noqa: SIM118 - not a dict


def test_a_bf16_checkpoint_stays_bf16_and_the_rounding_is_measured(quick_fit: Fit, tmp_path: Path) -> None:
    result = quick_fit("llama-bf16", "prompted", max_steps=20, lr=2e-2, output=tmp_path / "run")
    report = merge_run(tmp_path / "run", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")

    assert dtypes(tmp_path / "model") == {"BF16"}
    assert (report.dtype, report.reloaded, model.dtype) == ("bf16", True, torch.bfloat16)
    assert 0.0 < report.rounding_kl < 1e-3
    assert report.rounding_top1 > 0.9
    # A bf16 model's outputs carry 8 bits each.
    torch.testing.assert_close(logits(model), logits(result.model), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_another_dtype_can_be_asked_for(writer: Path, tmp_path: Path, dtype: str, stored: str) -> None:
    report = merge_run(writer, tmp_path / "model", dtype=dtype)
    assert dtypes(tmp_path / "model") == {stored}
    assert (report.dtype, report.reloaded) == (dtype, True)


def test_an_unknown_dtype_is_refused(writer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'bf61'\. Closest: 'bf16'"):
        merge_run(writer, tmp_path / "model", dtype="bf61")
    assert list(tmp_path.iterdir()) == []


def test_neither_run_nor_base_change(writer: Path, bases: Callable[[str], Path], tmp_path: Path) -> None:
    before = contents(writer), contents(bases("llama"))
    merge_run(writer, tmp_path / "model")
    assert (contents(writer), contents(bases("llama"))) == before


def test_what_is_there_is_refused_and_with_force_only_a_model_is_replaced(writer: Path, tmp_path: Path) -> None:
    merge_run(writer, tmp_path / "model")
    with pytest.raises(RunFolderError, match="exists already"):
        merge_run(writer, tmp_path / "model")
    merge_run(writer, tmp_path / "model", force=True)
    with pytest.raises(RunFolderError, match="is not a model folder"):
        merge_run(writer, writer, force=True)


def test_the_base_itself_is_never_replaced(quick_fit: Fit, bases: Callable[[str], Path], tmp_path: Path) -> None:
    quick_fit("llama", "prompted", max_steps=1, output=tmp_path / "run")
    before = contents(bases("llama"))
    with pytest.raises(RunFolderError, match="is the base itself"):
        merge_run(tmp_path / "run", bases("llama"), force=True)
    assert contents(bases("llama")) == before


def test_a_breach_of_the_tolerance_writes_nothing(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit("llama", "prompted", max_steps=1, output=tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    # Updates of 1e12 swallow the base's weights in the merged sum; unmerged they are added to its output.
    huge = {name: torch.full_like(t, 1e6 if "lora_A" in name else 1e8) for name, t in load_file(file).items()}
    alternating = {n: t * torch.where(torch.arange(t.shape[-1]) % 2 == 0, 1.0, -1.0) for n, t in huge.items()}
    save_file({name: tensor.contiguous() for name, tensor in alternating.items()}, file, metadata)
    with pytest.raises(MergeToleranceError, match="nothing was written"):
        merge_run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_divergence_is_the_mean_over_all_outputs() -> None:
    exact = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    rounded = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    p, q = exact[1, 0].softmax(-1), rounded[1, 0].softmax(-1)
    kl, top1 = divergence(exact, rounded)
    assert kl == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)
    assert top1 == 0.5


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_written_files_have_the_modes_that_the_umask_says(writer: Path, tmp_path: Path, mask: int) -> None:
    base = open_run(writer).base
    before = os.umask(mask)
    try:
        folder = save_model(base.model, base.tokenizer, tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
