"""The real ``peft`` loads an adapter that started from its base's weights as a plain LoRA, and computes the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import Handle
from lorakit.formats import load_adapter, read_adapter, save_adapter
from lorakit.inits import find_init, init_names
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA

from .models import FP32_TOLERANCE, build, output, shaken

peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")

SHIFTED = [name for name in init_names() if find_init(name).shifts and find_init(name).looks() is None]
LLAMA = ("q_proj", "v_proj", "down_proj")
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 5},
    "alpha_pattern": {r"0\..*proj": 5.0},
}
CASES: dict[str, tuple[str, Sequence[str], LoRA]] = {
    "linear": ("llama", LLAMA, LoRA(rank=4, alpha=6)),
    "rslora": ("llama", LLAMA, LoRA(rank=4, alpha=6, scaling="rslora")),
    "patterns": ("llama", LLAMA, LoRA(rank=4, alpha=6, **PATTERNS)),
    "rslora with patterns": ("llama", LLAMA, LoRA(rank=4, alpha=6, scaling="rslora", **PATTERNS)),
    "dora": ("llama", LLAMA, DoRA(rank=4, alpha=6)),
    "transposed": ("gpt2", ("c_attn", "mlp.c_proj"), LoRA(rank=3, alpha=6)),
    "embedding": ("bert", ("word_embeddings", "query"), LoRA(rank=3, alpha=6)),
    "biases": ("bert", ("query", "dense"), LoRA(rank=3, alpha=6, bias="lora_only")),
    "conv2d": ("conv", ("first", "second"), LoRA(rank=3, alpha=7, scaling="rslora")),
}
each = pytest.mark.parametrize(
    ("init", "case"), [(init, case) for init in SHIFTED for case in CASES], ids=lambda value: str(value)
)


def trained(init: str, case: str) -> tuple[Handle, dict[str, Tensor]]:
    name, targets, method = CASES[case]
    model, inputs = build(name)
    return shaken(model, method.replaced(init=init), targets), inputs


def bare(case: str) -> nn.Module:
    return build(CASES[case][0])[0]


@each
def test_our_file_gives_our_logits_in_peft(init: str, case: str, tmp_path: Path) -> None:
    handle, inputs = trained(init, case)
    expected, before = output(handle.model, inputs), output(bare(case), inputs)
    save_adapter(handle, tmp_path)
    found = output(peft.PeftModel.from_pretrained(bare(case), tmp_path), inputs)
    torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=0)
    assert (expected - before).abs().max() > 100 * FP32_TOLERANCE


@each
def test_our_file_gives_the_trained_model_on_a_pristine_base(init: str, case: str, tmp_path: Path) -> None:
    handle, inputs = trained(init, case)
    expected = output(handle.model, inputs)
    save_adapter(handle, tmp_path)
    model = bare(case)
    load_adapter(model, tmp_path)
    # A scale that was written as an alpha and divided again may be another fp64 number, by one ulp.
    torch.testing.assert_close(output(model, inputs), expected, atol=FP32_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("scaling", "alpha"), [("standard", 12.0), ("rslora", 6.0 * 2**0.5)])
def test_the_file_says_twice_the_rank_and_the_alpha_that_keeps_the_scale(
    scaling: str, alpha: float, tmp_path: Path
) -> None:
    model, _ = build("llama")
    save_adapter(shaken(model, LoRA(rank=4, alpha=6, scaling=scaling, init="pissa"), LLAMA), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert config["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
    assert read_adapter(tmp_path).method.init.name == "kaiming"
