from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from lorakit.bases import LayerLine, describe_model, describe_module, group_layers

Saved = Callable[..., Path]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_outline_of_a_folder_equals_that_of_the_live_model(saved: Saved, kind: str) -> None:
    folder = saved(kind)
    assert describe_model(folder) == describe_module(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("llama", "model.layers.{0..1}.self_attn.k_proj  Linear 16 -> 8"),
        ("llama", "model.embed_tokens  Embedding 32 -> 16"),
        ("llama", "model.norm  norm 16"),
        ("gpt2", "transformer.h.{0..1}.attn.c_attn  Conv1D 16 -> 48"),
        ("bert", "bert.encoder.layer.{0..1}.intermediate.dense  Linear 16 -> 24"),
        ("t5", "decoder.block.{0..1}.layer.{0..1}.layer_norm  norm 16"),
    ],
)
def test_layers_are_grouped_with_kind_and_shape(saved: Saved, kind: str, line: str) -> None:
    groups = [str(group) for group in describe_model(saved(kind)).groups]
    assert line in groups or line.replace("{0..1}.layer_norm", "{0..2}.layer_norm") in groups


def test_target_names_are_the_linear_layers(saved: Saved) -> None:
    names = describe_model(saved("gpt2")).target_names
    assert names == ("c_attn", "c_proj", "c_fc")  # lm_head is tied to the embedding


def test_parameters_are_counted_once(saved: Saved) -> None:
    folder = saved("gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    outline = describe_model(folder)
    assert outline.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert sum(line.num_parameters for line in outline.layers) == outline.num_params
    assert (outline.model_type, outline.architectures, outline.dtype) == ("gpt2", ("GPT2LMHeadModel",), "fp32")


def test_unknown_architecture_is_outlined_from_its_shapes(saved: Saved) -> None:
    folder = saved("llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ours"}))
    outline = describe_model(folder)
    assert not outline.exact
    groups = [str(group) for group in outline.groups]
    assert "model.layers.{0..1}.mlp.up_proj  Linear 16 -> 24" in groups
    assert "model.embed_tokens  Embedding 32 -> 16" in groups


def test_convolutions_and_adapters_in_a_plain_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (2, 5)), nn.Linear(4, 6))
    model[1].add_module("lorakit", nn.Linear(4, 2))
    lines = [(line.path, line.kind, line.d_out, line.d_in) for line in describe_module(model).layers]
    assert lines == [("0", "Conv2d", 8, 30), ("1", "Linear", 6, 4)]


def test_ranges_never_claim_a_layer_that_is_not_there() -> None:
    paths = ["h.0.experts.0.w", "h.0.experts.1.w", "h.1.experts.0.w", "h.3.experts.0.w"]
    groups = group_layers(LayerLine(path, "Linear", 2, 2, 4) for path in paths)
    assert [(group.pattern, group.count) for group in groups] == [
        ("h.0.experts.{0..1}.w", 2),
        ("h.1.experts.0.w", 1),
        ("h.3.experts.0.w", 1),
    ]


def test_gaps_in_a_range_are_written_out() -> None:
    groups = group_layers(LayerLine(f"h.{i}", "Linear", 2, 2, 4) for i in (0, 1, 2, 5, 7, 8))
    assert groups[0].pattern == "h.{0..2,5,7..8}"
