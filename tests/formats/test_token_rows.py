"""Rows of tokens in PEFT's spelling: what PEFT computes with our file, and we with its."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import BaseMismatchError, FormatError, ShapeError
from lorakit.formats import load_adapter, save_adapter
from lorakit.formats.store import read_adapter

VOCABULARY, NEW = 24, 3
SUM_ORDER = 2e-5  # fp32 sums in another order, and a row as base + (row - base); logits are of order 1
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ROWS = f"embed_tokens[{VOCABULARY}:{VOCABULARY + NEW}],lm_head[{VOCABULARY}:{VOCABULARY + NEW}]"

# What PEFT says where it saves the base's tables because the model's size is not the config's on the hub.
saves_the_base = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def base(tied: bool = False, more: int = 0, seed: int = 0) -> Any:
    """Return a tiny LLaMA with ``more`` tokens, whose rows come from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **SIZES)).eval()
        torch.manual_seed(seed)
        if more:
            model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
    return model


def tokens() -> Tensor:
    return torch.tensor([[3, VOCABULARY, 4, VOCABULARY + NEW - 1], [VOCABULARY + 1, 5, 6, VOCABULARY]])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


def trained(model: nn.Module, rows: str = ROWS, targets: str = "q_proj") -> Handle:
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=3), targets, train_modules=rows, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return handle


def peft_module() -> Any:
    return pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")


@tied_or_not
def test_it_comes_back_on_the_base_before_it_grew(tied: bool, tmp_path: Path) -> None:
    model = base(tied, NEW)
    save_adapter(trained(model), tmp_path)
    fresh = base(tied)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=SUM_ORDER)
    assert fresh.config.vocab_size == VOCABULARY + NEW


@tied_or_not
def test_it_comes_back_over_any_other_new_rows(tied: bool, tmp_path: Path) -> None:
    model = base(tied, NEW)
    save_adapter(trained(model), tmp_path)
    fresh = base(tied, NEW, seed=5)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0, atol=SUM_ORDER)


@tied_or_not
def test_tables_trained_in_full_come_back_on_the_base_before_it_grew(tied: bool, tmp_path: Path) -> None:
    model = base(tied, NEW)
    save_adapter(trained(model, "embed_tokens,lm_head"), tmp_path)
    fresh = base(tied)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(base(more=NEW)), tmp_path)
    other = base()
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match=r"embed_tokens\.weight"):
        load_adapter(other, tmp_path)


@tied_or_not
def test_a_file_says_the_same_again(tied: bool, tmp_path: Path) -> None:
    handle = trained(base(tied, NEW), f"embed_tokens[2:4,7:8],embed_tokens[{VOCABULARY}:{VOCABULARY + NEW}]")
    save_adapter(handle, tmp_path)
    state, read = handle.state(), read_adapter(tmp_path)
    assert read.rows.keys() == state.rows.keys()
    for path, site in state.rows.items():
        assert torch.equal(read.rows[path].tensors["rows"], site.tensors["rows"])
        assert (read.rows[path].kind, read.rows[path].runs) == (site.kind, site.runs)
        assert (read.rows[path].weight_shape, read.rows[path].options) == (site.weight_shape, site.options)


@tied_or_not
def test_peft_computes_the_same_with_our_file(tied: bool, tmp_path: Path) -> None:
    peft = peft_module()
    model = base(tied, NEW)
    save_adapter(trained(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(tied, NEW, seed=5), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=SUM_ORDER)


def test_peft_computes_the_same_with_a_scaled_embedding(tmp_path: Path) -> None:
    peft = peft_module()
    torch.manual_seed(0)
    plain = GemmaForCausalLM(GemmaConfig(vocab_size=VOCABULARY + NEW, head_dim=8, num_key_value_heads=1, **SIZES))
    model = copy.deepcopy(plain).eval()
    save_adapter(trained(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain.eval(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=SUM_ORDER)


@saves_the_base
@tied_or_not
@pytest.mark.parametrize("more", [0, NEW], ids=["original base", "extended base"])
def test_pefts_own_file_gives_the_same_here(tied: bool, more: int, tmp_path: Path) -> None:
    peft = peft_module()
    new = list(range(VOCABULARY + NEW - 1, VOCABULARY - 1, -1))  # PEFT takes them in any order
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        trainable_token_indices=[*new, 2] if tied else {"embed_tokens": [*new, 2], "lm_head": new},
    )
    theirs = peft.get_peft_model(base(tied, NEW), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    expected = logits(theirs.eval())
    theirs.save_pretrained(tmp_path)
    fresh = base(tied, more)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected, rtol=0, atol=SUM_ORDER)


def test_a_head_with_a_bias_is_kept_from_peft(tmp_path: Path) -> None:
    """PEFT leaves the head's bias out where it trains rows of the head."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=VOCABULARY + NEW, partial_rotary_factor=0.5, **SIZES))
    handle = trained(model.eval())
    save_adapter(handle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    assert read_adapter(tmp_path).rows.keys() == handle.state().rows.keys()


def test_the_tensor_stands_under_pefts_key(tmp_path: Path) -> None:
    handle = trained(base(tied=True, more=NEW))
    save_adapter(handle, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if "token" in key]  # noqa: SIM118 (no iterator in safetensors)
        rows = file.get_tensor(keys[0])
    assert keys == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert torch.equal(rows, handle.parameters()[f"model.embed_tokens[{VOCABULARY}:{VOCABULARY + NEW}].rows"])


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([1, 2], r"has rows \[3, 16\], the config's 'trainable_token_indices' does not say of which"),
        ({"other": [1, 2, 3]}, "does not say of which"),
        ([1, 2, 2], "does not say of which"),
        ({"embed_tokens": [1, 2, 3]}, "the file's own notes name other rows"),
        ({"embed_tokens": [24, 25, 26], "lm_head": [1]}, "the rows of 'lm_head'.*are missing"),
    ],
)
def test_a_config_that_says_other_rows_is_refused(indices: Any, problem: str, tmp_path: Path) -> None:
    save_adapter(trained(base(tied=True, more=NEW)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": indices}))
    with pytest.raises(FormatError, match=problem):
        read_adapter(tmp_path)


def test_a_base_with_adapters_cannot_grow(tmp_path: Path) -> None:
    save_adapter(trained(base(more=NEW)), tmp_path)
    fresh = base()
    lk.attach(fresh, "lora", "v_proj", name="first")
    with pytest.raises(ShapeError, match=r"needs 27 tokens and the model has 24.*before the others"):
        load_adapter(fresh, tmp_path, "second")
