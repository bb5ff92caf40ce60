"""The real ``peft`` computes the same from our file, and we the same from its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import handle_of
from lorakit.formats import load_adapter, read_adapter, save_adapter
from lorakit.methods.dora import DoRA
from lorakit.methods.lora import LoRA
from lorakit.methods.method import Method

from .models import FP32_TOLERANCE, build, output, shake, shaken

peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")


PLAIN = LoRA(rank=4, alpha=6)


@dataclass(frozen=True)
class Case:
    """One adapter, in our words and in PEFT's."""

    model: str
    targets: Sequence[str]
    method: Method = PLAIN
    train: Sequence[str] = ()
    theirs: dict[str, Any] = field(default_factory=dict)
    task_type: str | None = None

    def peft_config(self) -> Any:
        settings = {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": list(self.targets),
            "modules_to_save": list(self.train) or None,
            "task_type": self.task_type,
        }
        return peft.LoraConfig(**{**settings, **self.theirs})


LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]
CONV = ["first", "second"]
DORA = DoRA(rank=4, alpha=6)
USE_DORA = {"use_dora": True}

CASES = {
    "linear-llama": Case("llama", LLAMA),
    "linear-bert": Case("bert", ["query", "intermediate.dense"]),
    "transposed": Case("gpt2", GPT2, theirs={"fan_in_fan_out": True}),
    "transposed-and-linear": Case("gpt2", [*GPT2, "score"], LoRA(rank=2, alpha=6), theirs={"r": 2}),
    "embedding": Case("bert", ["word_embeddings", "query"]),
    "embedding-with-base-weight": Case("llama", ["embed_tokens", "q_proj"]),
    "head-with-base-weight": Case("llama", ["embed_tokens", "lm_head"]),
    "conv2d": Case("conv", CONV),
    "dora-linear": Case("llama", LLAMA, DORA, theirs=USE_DORA),
    "dora-linear-bias": Case("bert", ["query", "intermediate.dense"], DORA, theirs=USE_DORA),
    "dora-transposed": Case("gpt2", GPT2, DORA, theirs={**USE_DORA, "fan_in_fan_out": True}),
    "dora-embedding": Case("bert", ["word_embeddings", "query"], DORA, theirs=USE_DORA),
    "dora-conv2d": Case("conv", CONV, DORA, theirs=USE_DORA),
    "classifier": Case("bert", ["query"], train=["classifier"]),
    "classifier-by-task": Case("bert", ["query"], train=["classifier"], task_type="SEQ_CLS"),
    "score-by-task": Case("gpt2", ["c_attn"], train=["score"], theirs={"fan_in_fan_out": True}, task_type="SEQ_CLS"),
    "holder-of-layers": Case("bert", ["query"], train=["pooler", "LayerNorm"]),
    "rank-and-alpha-pattern": Case(
        "llama",
        LLAMA,
        LoRA(rank=4, alpha=6, rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 7}, alpha_pattern={r"0\..*proj": 5}),
        theirs={
            "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 7},
            "alpha_pattern": {r"0\..*proj": 5},
        },
    ),
    "rslora": Case("llama", LLAMA, LoRA(rank=4, alpha=6, scaling="rslora"), theirs={"use_rslora": True}),
    "rslora-dora-pattern": Case(
        "llama",
        LLAMA,
        DoRA(rank=4, alpha=6, scaling="rslora", rank_pattern={"q_proj": 3}),
        theirs={**USE_DORA, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ),
    "bias-lora-only": Case(
        "bert", ["query", "dense"], LoRA(rank=3, alpha=6, bias="lora_only"), theirs={"r": 3, "bias": "lora_only"}
    ),
    "bias-all": Case("bert", ["query"], LoRA(rank=4, alpha=6, bias="all"), theirs={"bias": "all"}),
    "bias-all-classifier": Case(
        "bert", ["query"], LoRA(rank=4, alpha=6, bias="all"), train=["classifier"], theirs={"bias": "all"}
    ),
    "bias-all-transposed": Case(
        "gpt2", GPT2, LoRA(rank=4, alpha=6, bias="all"), theirs={"bias": "all", "fan_in_fan_out": True}
    ),
    "bias-conv2d": Case("conv", CONV, LoRA(rank=4, alpha=6, bias="lora_only"), theirs={"bias": "lora_only"}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def ours(case: Case) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = build(case.model)
    return shaken(model, case.method, case.targets, train_modules=case.train), inputs


def theirs(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = build(case.model)
    adapted = peft.get_peft_model(model, case.peft_config()).eval()
    shake(p for p in adapted.parameters() if p.requires_grad)
    return adapted, inputs


@every_case
def test_our_file_gives_our_logits_in_peft(case: Case, tmp_path: Path) -> None:
    handle, inputs = ours(case)
    expected = output(handle.model, inputs)
    save_adapter(handle, tmp_path, task_type=case.task_type)

    base, _ = build(case.model)
    before = output(base, inputs)
    found = output(peft.PeftModel.from_pretrained(base, tmp_path), inputs)

    torch.testing.assert_close(found, expected, atol=FP32_TOLERANCE, rtol=0)
    assert (expected - before).abs().max() > 100 * FP32_TOLERANCE


@every_case
def test_pefts_file_gives_pefts_logits_here(case: Case, tmp_path: Path) -> None:
    adapted, inputs = theirs(case)
    expected = output(adapted, inputs)
    adapted.save_pretrained(tmp_path)

    base, _ = build(case.model)
    before = output(base, inputs)
    load_adapter(base, tmp_path)

    torch.testing.assert_close(output(base, inputs), expected, atol=FP32_TOLERANCE, rtol=0)
    assert (expected - before).abs().max() > 100 * FP32_TOLERANCE


@every_case
def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_base(case: Case, tmp_path: Path) -> None:
    handle, inputs = ours(case)
    expected = output(handle.model, inputs)
    save_adapter(handle, tmp_path)

    base, _ = build(case.model)
    load_adapter(base, tmp_path)

    assert torch.equal(output(base, inputs), expected)
    assert handle_of(base) is not None
    assert read_adapter(tmp_path).method == case.method


def test_a_rank_that_the_method_does_not_say_reaches_peft_by_pattern(tmp_path: Path) -> None:
    """Tensors may have another rank than the method's, as after a rank allocation."""
    import dataclasses

    from lorakit.adapters import SiteState
    from lorakit.formats.store import write_adapter

    handle, inputs = ours(Case("llama", LLAMA))
    state = handle.state()
    path = "model.layers.1.self_attn.q_proj"
    old = state.sites[path]
    cut = {"A": old.tensors["A"][:3], "B": old.tensors["B"][:, :3]}
    state = dataclasses.replace(state, sites={**state.sites, path: SiteState(old.kind, old.weight_shape, cut)})
    write_adapter(state, tmp_path)

    base, _ = build("llama")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path)
    layer = adapted.get_submodule(f"base_model.model.{path}")
    assert layer.r["default"] == 3
    assert layer.scaling["default"] == state.method.scale_at(path, 3)

    again, _ = build("llama")
    load_adapter(again, tmp_path)
    torch.testing.assert_close(output(again, inputs), output(adapted, inputs), atol=FP32_TOLERANCE, rtol=0)
