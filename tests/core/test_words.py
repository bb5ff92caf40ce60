"""The words 'attention', 'mlp' and 'all-linear' on real architectures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from lorakit.adapters.coverage import coverage
from lorakit.adapters.targets import find_sites, head_paths
from lorakit.errors import TargetError

from .models import Tower

Build = Callable[..., nn.Module]

# Last components (with as much before them as tells them apart), blocks, and heads.
ATTENTION = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
    "bert": {"self.query", "self.key", "self.value", "attention.output.dense"},
    "distilbert": {"attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"},
    "t5": {f"{kind}.{name}" for kind in ("SelfAttention", "EncDecAttention") for name in "qkvo"},
}
MLP = {
    "llama": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "bert": {"intermediate.dense", "output.dense"},
    "distilbert": {"ffn.lin1", "ffn.lin2"},
    "t5": {"DenseReluDense.wi", "DenseReluDense.wo"},
}
NUM_ATTENTION = {"llama": 3 * 4, "gpt2": 2 * 2, "bert": 2 * 4, "distilbert": 2 * 4, "t5": 2 * 4 + 2 * 8}
NUM_MLP = {"llama": 3 * 3, "gpt2": 2 * 2, "bert": 2 * 2, "distilbert": 2 * 2, "t5": 4 * 2}
# Linear layers in no block and no head.
BESIDE = {"llama": set(), "gpt2": set(), "bert": {"bert.pooler.dense"}, "distilbert": set(), "t5": set()}
HEADS = {
    "llama": ["lm_head"],
    "gpt2": ["lm_head"],
    "bert": ["classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "t5": ["lm_head"],
}

architectures = pytest.mark.parametrize("name", ATTENTION)


def paths(model: nn.Module, targets: str) -> set[str]:
    return {site.path for site in find_sites(model, targets)}


def ends(path: str, names: set[str]) -> bool:
    return any(path.endswith("." + name) for name in names)


@architectures
def test_attention_is_every_projection_of_every_attention(build: Build, name: str) -> None:
    found = paths(build(name), "attention")
    assert len(found) == NUM_ATTENTION[name]
    assert all(ends(path, ATTENTION[name]) for path in found)
    assert all(any(ends(path, {end}) for path in found) for end in ATTENTION[name])


@architectures
def test_mlp_is_every_other_linear_layer_of_the_blocks(build: Build, name: str) -> None:
    found = paths(build(name), "mlp")
    assert len(found) == NUM_MLP[name]
    assert all(ends(path, MLP[name]) for path in found)
    assert not any("attention" in path.lower() for path in found)


@architectures
def test_all_linear_is_both_and_what_is_in_no_block(build: Build, name: str) -> None:
    model = build(name)
    assert paths(model, "all-linear") == paths(model, "attention") | paths(model, "mlp") | BESIDE[name]


@architectures
def test_heads_and_embeddings_are_no_target_of_a_word(build: Build, name: str) -> None:
    model = build(name)
    assert head_paths(model) == HEADS[name]
    found = paths(model, "all-linear")
    assert not found & set(HEADS[name])
    assert not any("emb" in path or "wte" in path for path in found)


@architectures
def test_a_head_is_a_target_where_it_is_named(build: Build, name: str) -> None:
    model = build(name, tie_word_embeddings=False) if name == "llama" else build(name)
    assert set(HEADS[name]) <= paths(model, ",".join(HEADS[name]))


@architectures
def test_all_linear_says_which_share_it_cannot_reach(build: Build, name: str) -> None:
    model = build(name)
    found = coverage(model, find_sites(model, "all-linear"))
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() >= 2}
    assert found.total == sum(matrices.values())
    assert found.reached == sum(site.layer.get_parameter("weight").numel() for site in find_sites(model, "all-linear"))
    assert found.reached + sum(count for _, count in found.unreached) == found.total
    assert found.unreached


def test_words_and_names_can_be_mixed(build: Build) -> None:
    model = build("llama")
    assert paths(model, "attention,lm_head") == paths(model, "attention") | {"lm_head"}


def test_a_word_that_means_nothing_in_this_model_is_refused() -> None:
    with pytest.raises(TargetError, match="no layer matches the word 'attention'"):
        find_sites(Tower(), "attention")


def test_a_body_without_a_head_has_no_head(build: Build) -> None:
    model = build("bert").get_submodule("bert")
    assert head_paths(model) == []
    assert len(paths(model, "all-linear")) == NUM_ATTENTION["bert"] + NUM_MLP["bert"] + 1
