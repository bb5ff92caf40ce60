"""What the words mean in every model of the zoo, by a table made by hand, and in models that test one rule each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lorakit.adapters.targets import Places, find_sites, head_paths, is_below
from lorakit.adapters.words import WORDS
from lorakit.errors import TargetError

from .models import ZOO, build, transformer


@dataclass(frozen=True)
class Names:
    """Which layers of a model are what, by the ends of their paths, the longest that fits; heads by whole paths.

    Attributes:
        attention: projections of attentions.
        mlp: feed-forwards and experts.
        other: what 'all-linear' has besides.
        left_out: what no word means, besides heads: look-ups, convolutions, gates that choose experts.
        heads: output heads.
    """

    attention: str = ""
    mlp: str = ""
    other: str = ""
    left_out: str = ""
    heads: str = ""

    def kind_of(self, path: str) -> str:
        """Return the field that a layer belongs to."""
        if is_below(path, self.heads.split()):
            return "heads"
        ends = [
            (len(end), kind)
            for kind in ("attention", "mlp", "other", "left_out")
            for end in getattr(self, kind).split()
            if path == end or path.endswith(f".{end}")
        ]
        return max(ends)[1] if ends else "not in the table"


LLAMA = Names(
    "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", left_out="embed_tokens", heads="lm_head"
)  # Touvron et al. 2023; grouped heads and a gated feed-forward, as in its successors
EXPERTS = "experts.gate_up_proj experts.down_proj"
SEQUENCES = Names(
    "q_proj k_proj v_proj out_proj", "fc1 fc2", left_out="embed_tokens embed_positions shared", heads="lm_head"
)

NAMES = {
    "gpt2": Names("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", left_out="wte wpe", heads="lm_head"),
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma3": LLAMA,
    "mistral": LLAMA,
    "phi": Names("q_proj k_proj v_proj dense", "fc1 fc2", left_out="embed_tokens", heads="lm_head"),
    "phi3": Names("qkv_proj o_proj", "gate_up_proj down_proj", left_out="embed_tokens", heads="lm_head"),
    "gpt_neox": Names(
        "query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h", left_out="embed_in", heads="lm_head"
    ),
    "bloom": Names(
        "query_key_value self_attention.dense",
        "dense_h_to_4h dense_4h_to_h",
        left_out="word_embeddings",
        heads="lm_head",
    ),
    "falcon": Names(
        "query_key_value self_attention.dense",
        "dense_h_to_4h dense_4h_to_h",
        left_out="word_embeddings",
        heads="lm_head",
    ),
    "mixtral": Names(LLAMA.attention, EXPERTS, left_out="embed_tokens", heads="lm_head"),
    "qwen2_moe": Names(
        LLAMA.attention, f"{EXPERTS} {LLAMA.mlp}", left_out="embed_tokens shared_expert_gate", heads="lm_head"
    ),
    "gpt_oss": Names(LLAMA.attention, EXPERTS, left_out="embed_tokens", heads="lm_head"),
    # A selective state space stands in the place of both; its mixer reads dt_proj and conv1d itself.
    "mamba": Names(other="in_proj x_proj out_proj", left_out="embeddings conv1d dt_proj", heads="lm_head"),
    "bert": Names(
        "query key value attention.output.dense",
        "intermediate.dense output.dense",
        other="pooler.dense",  # pretrained, of the body, in no block
        left_out="word_embeddings position_embeddings token_type_embeddings",
        heads="classifier",
    ),
    "distilbert": Names(
        "q_lin k_lin v_lin out_lin",
        "lin1 lin2",
        left_out="word_embeddings position_embeddings",
        heads="pre_classifier classifier",
    ),
    "roberta": Names(
        "query key value attention.output.dense",
        "intermediate.dense output.dense",
        left_out="word_embeddings position_embeddings token_type_embeddings",
        heads="classifier",
    ),
    "modernbert": Names("Wqkv attn.Wo", "Wi mlp.Wo", left_out="tok_embeddings", heads="head classifier"),
    "t5": Names("q k v o", "wi wo", left_out="shared embed_tokens relative_attention_bias", heads="lm_head"),
    "bart": SEQUENCES,
    "whisper": Names(
        SEQUENCES.attention, SEQUENCES.mlp, left_out="embed_tokens embed_positions conv1 conv2", heads="proj_out"
    ),
    "wav2vec2": Names(
        "q_proj k_proj v_proj out_proj",
        "intermediate_dense output_dense",
        other="feature_projection.projection",
        left_out="conv",
        heads="lm_head",
    ),
    "vit": Names("q_proj k_proj v_proj o_proj", "fc1 fc2", left_out="patch_embeddings.projection", heads="classifier"),
    "clip": Names(
        "q_proj k_proj v_proj out_proj",
        "fc1 fc2",
        other="visual_projection text_projection",
        left_out="token_embedding position_embedding patch_embedding",
    ),
    "resnet": Names(left_out="convolution", heads="classifier"),
    # Of torch's own layers: no class says which one is a head.
    "own_resnet": Names(other="head", left_out="stem conv1 conv2 downsample.0"),
    "lstm": Names(
        other="weight_ih_l0 weight_hh_l0 weight_ih_l0_reverse weight_hh_l0_reverse tag",
        left_out="embed",
    ),
}
MEANS = {"attention": ("attention",), "mlp": ("mlp",), "all-linear": ("attention", "mlp", "other")}

every_model = pytest.mark.parametrize("name", ZOO)
every_word = pytest.mark.parametrize("word", WORDS)


def paths(model: nn.Module, word: str) -> set[str]:
    return {site.path for site in find_sites(model, word)}


@every_model
def test_the_table_knows_every_layer_of_a_model(name: str) -> None:
    unknown = [path for path in Places.of(build(name)).sites if NAMES[name].kind_of(path) == "not in the table"]
    assert unknown == []


@every_word
@every_model
def test_a_word_means_what_the_table_says(name: str, word: str) -> None:
    model = build(name)
    expected = {path for path in Places.of(model).sites if NAMES[name].kind_of(path) in MEANS[word]}
    if expected:
        assert paths(model, word) == expected
    else:
        with pytest.raises(TargetError, match=f"no layer matches the word '{word}'"):
            find_sites(model, word)


@every_model
def test_the_heads_are_those_of_the_table(name: str) -> None:
    assert head_paths(build(name)) == sorted(NAMES[name].heads.split())


# Each an architecture whose names or classes could mislead: (word, ends that are in it, ends that are not).
RULES = {
    "the nearest name counts": (
        transformer("perceiver", "PerceiverForMaskedLM", "PerceiverConfig"),
        "attention",
        "encoder.cross_attention.attention.self.query self_attends.0.attention.output.dense",
        "encoder.cross_attention.mlp.dense1 self_attends.0.mlp.dense2",
    ),
    "a class says it where no name does": (
        transformer("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", num_hidden_layers=3),
        "attention",
        "layers.2.temporal_block.q_proj layers.2.temporal_block.o_proj",
        "layers.0.temporal_block.linear_x layers.0.mlp_block.gate_proj",
    ),
    "a recurrence is no feed-forward": (
        transformer("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", num_hidden_layers=3),
        "mlp",
        "layers.0.mlp_block.gate_proj layers.2.mlp_block.down_proj",
        "layers.0.temporal_block.linear_x layers.2.temporal_block.q_proj",
    ),
    "what thins a stage out is no feed-forward": (
        transformer("swin", "SwinForImageClassification", "SwinConfig", depths=[1, 1], num_heads=[1, 2]),
        "mlp",
        "layers.0.blocks.0.mlp.fc1 layers.1.blocks.0.mlp.fc2",
        "downsample.reduction attention.o_proj",
    ),
    "a position bias in an attention leaves the feed-forward beside it": (
        transformer("swinv2", "Swinv2ForImageClassification", "Swinv2Config", depths=[1, 1], num_heads=[1, 2]),
        "mlp",
        "blocks.0.intermediate.dense blocks.0.output.dense",
        "downsample.reduction attention.output.dense",
    ),
    "a router is no expert": (
        transformer(
            "switch_transformers",
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=2,
        ),
        "all-linear",
        "SelfAttention.q EncDecAttention.o",
        "router.classifier lm_head",
    ),
    "layers that a mixer reads itself are none": (
        transformer("jamba", "JambaForCausalLM", "JambaConfig", num_hidden_layers=2, num_experts=2),
        "all-linear",
        "mamba.in_proj mamba.x_proj feed_forward.gate_proj",
        "mamba.dt_proj lm_head",
    ),
    "a state space beside a feed-forward is none": (
        transformer("jamba", "JambaForCausalLM", "JambaConfig", num_hidden_layers=2, num_experts=2),
        "mlp",
        "feed_forward.gate_proj feed_forward.down_proj",
        "mamba.in_proj mamba.out_proj",
    ),
    "torch's own encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 20), 2, enable_nested_tensor=False),
        "mlp",
        "layers.0.linear1 layers.1.linear2",
        "layers.0.self_attn.out_proj",
    ),
    "numbered layers alone are a feed-forward": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
        "mlp",
        "0 2",
        "1",
    ),
    "a head beside no body is one by its labels": (
        transformer("clip", "CLIPForImageClassification", "CLIPConfig"),
        "all-linear",
        "self_attn.q_proj fc1",
        "classifier",
    ),
}


@pytest.mark.parametrize(("make", "word", "inside", "outside"), RULES.values(), ids=RULES)
def test_a_word_keeps_its_rules(make: Callable[[], nn.Module], word: str, inside: str, outside: str) -> None:
    with torch.device("meta"):
        model = make()
    known = [path for path, _ in model.named_modules()]
    found = paths(model, word)
    assert all(any(path.endswith(end) for path in found) for end in inside.split())
    assert all(any(path.endswith(end) for path in known) for end in outside.split())
    assert not any(path.endswith(end) for path in found for end in outside.split())
