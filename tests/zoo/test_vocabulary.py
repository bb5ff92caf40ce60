"""An adapter on a vocabulary that was extended before it was attached, with tied and with untied heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import BaseMismatchError, FormatError, ShapeError
from lorakit.formats import load_adapter, save_adapter

from .conftest import LEARNING_RATE, STEPS, loss_of
from .models import VOCABULARY, build, logits

NEW = 3
SUM_ORDER = 2e-5  # as in test_zoo: fp32 sums in another order, logits of order 1 to 10

tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
# What PEFT says of an update of one of two tied weights, and of the base's weights that it saves beside one.
tie_is_known = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
saves_the_base = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
targets = pytest.mark.parametrize("names", ["embed_tokens,q_proj", "embed_tokens,lm_head,v_proj"])


def base(tied: bool, more: int = NEW, seed: int = 0) -> Any:
    """Return a LLaMA with a vocabulary extended by ``more`` tokens, whose rows come from ``seed``."""
    model: Any = build("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if more:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
    return model


def batch() -> dict[str, Tensor]:
    """Return tokens among which are new ones, as input and as goal."""
    tokens = torch.tensor([[3, VOCABULARY, 4, VOCABULARY + NEW - 1], [VOCABULARY + 1, 5, 6, VOCABULARY]])
    return {"input_ids": tokens, "labels": tokens}


def trained(model: nn.Module, names: str, **options: str) -> Handle:
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=3), names, **options)
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch())["loss"].backward()
        optimizer.step()
    return handle


@targets
@tied_or_not
def test_new_tokens_are_learned_and_the_base_stays(tied: bool, names: str) -> None:
    model = base(tied)
    before = loss_of(model, batch())
    handle = lk.attach(base(tied), lk.LoRA(rank=2, alpha=3), names)
    digest = handle.digest()
    handle = trained(model, names)
    assert loss_of(model, batch()) < before
    assert handle.digest() == digest
    column = handle.updates()["model.embed_tokens"].get_parameter("A").grad
    assert column is not None
    assert column[:, VOCABULARY:].abs().sum() > 0


@targets
@tied_or_not
def test_it_comes_back_on_an_equally_extended_base(tied: bool, names: str, tmp_path: Path) -> None:
    model = base(tied)
    save_adapter(trained(model, names), tmp_path)
    fresh = base(tied)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch()), logits(model, batch()))


@targets
@tied_or_not
@tie_is_known
def test_peft_gives_the_same_on_an_equally_extended_base(tied: bool, names: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    model = base(tied)
    save_adapter(trained(model, names), tmp_path)
    found = logits(peft.PeftModel.from_pretrained(base(tied), tmp_path).eval(), batch())
    torch.testing.assert_close(found, logits(model, batch()), rtol=0, atol=SUM_ORDER)


@targets
@tied_or_not
@tie_is_known
@saves_the_base
def test_pefts_own_file_gives_the_same_here(tied: bool, names: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    theirs = peft.get_peft_model(base(tied), peft.LoraConfig(r=2, lora_alpha=3, target_modules=names.split(",")))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    expected = logits(theirs.eval(), batch())
    theirs.save_pretrained(tmp_path)
    fresh = base(tied)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh, batch()), expected, rtol=0, atol=SUM_ORDER)


@targets
@tied_or_not
def test_merged_equals_unmerged_and_a_tie_returns(tied: bool, names: str) -> None:
    model = base(tied)
    handle = trained(model, names)
    before, digest = logits(model, batch()), handle.digest()
    handle.merge()
    torch.testing.assert_close(logits(model, batch()), before, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    assert handle.digest() == digest
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@tied_or_not
def test_a_base_that_is_not_extended_is_refused(tied: bool, tmp_path: Path) -> None:
    save_adapter(trained(base(tied), "embed_tokens,q_proj"), tmp_path)
    plain = base(tied, more=0)
    with pytest.raises(BaseMismatchError):
        load_adapter(plain, tmp_path)
    assert lk.handle_of(plain) is None


@tied_or_not
def test_it_is_told_which_vocabulary_the_adapter_needs(tied: bool, tmp_path: Path) -> None:
    save_adapter(trained(base(tied), "embed_tokens,q_proj"), tmp_path)
    expected = (
        rf"'model.embed_tokens' has {VOCABULARY} tokens here, but {VOCABULARY + NEW} in the adapter: "
        rf"call model.resize_token_embeddings\({VOCABULARY + NEW}\) first"
    )
    with pytest.raises(ShapeError, match=expected):
        load_adapter(base(tied, more=0), tmp_path, check_base=False)


def test_other_numbers_in_the_new_rows_are_another_base(tmp_path: Path) -> None:
    """transformers draws the rows of new tokens: two extensions of one base are two bases."""
    save_adapter(trained(base(tied=False), "embed_tokens,q_proj"), tmp_path)
    with pytest.raises(BaseMismatchError, match="other weights: 2 of 168 sampled values differ"):
        load_adapter(base(tied=False, seed=1), tmp_path)


@tied_or_not
def test_tables_trained_in_full_come_back_over_any_new_rows(tied: bool, tmp_path: Path) -> None:
    model = base(tied)
    save_adapter(trained(model, "q_proj", train_modules="embed_tokens,lm_head"), tmp_path)
    fresh = base(tied, seed=1)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch()), logits(model, batch()))


@saves_the_base
def test_pefts_file_on_a_base_that_is_not_extended_names_both_sizes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    theirs = peft.get_peft_model(base(tied=False), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path)
    sizes = rf"'model.embed_tokens.weight' is \({VOCABULARY + NEW}, 16\) there, \({VOCABULARY}, 16\) here"
    with pytest.raises(FormatError, match=sizes):
        load_adapter(base(tied=False, more=0), tmp_path)
