"""Adapters without low-rank updates: modules trained in full alone, saved in PEFT's folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification

import lorakit as lk


def tiny() -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("method", ["full", "head"])
def test_it_comes_back_as_it_was_and_peft_refuses_it(method: str, tmp_path: Path) -> None:
    model = tiny()
    base, theirs = copy.deepcopy(model), copy.deepcopy(model)
    handle = lk.attach(model, method)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    lk.save(handle, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"] == []
    ids = torch.randint(5, 40, (2, 7))
    again = lk.load(base, tmp_path / "adapter")
    assert again.state().method == handle.state().method
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(base(ids).logits, expected)
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(theirs, tmp_path / "adapter")
