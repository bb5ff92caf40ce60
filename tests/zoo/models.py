"""The zoo: one tiny real model per family, built from its config, with a batch that has a loss.

Two blocks or so each, narrow, no layer of a block square where the family allows it. transformers' classes
are imported by the module that defines them: the whole package would take ten seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 41
LENGTH = 7
ROWS = 3
LABELS = 3

# Far above what such models start with, so that every layer of so small a one moves its logits.
SPREAD = 0.3

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": SPREAD, **SPECIAL}
BLOCKS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = {**TEXT, **BLOCKS, "max_position_embeddings": 32}
GROUPED = {**DECODER, "num_key_value_heads": 1, "head_dim": 12}  # q: 24 x 16, k and v: 12 x 16
ENCODER = {**TEXT, **BLOCKS, "max_position_embeddings": 32, "num_labels": LABELS}
PIXELS = {**BLOCKS, "image_size": 16, "patch_size": 8, "initializer_range": SPREAD}

Batch = dict[str, Any]


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo.

    Attributes:
        family: what the architecture is called.
        make: builds it; all its numbers come from torch's generator.
        batch: makes inputs with which its output has a ``loss``.
        targets: what the zoo adapts: a word, or the convolutions of a model that has little else.
        peft_refuses: what PEFT says of such an adapter where it cannot load it.
    """

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    targets: str = "all-linear"
    peft_refuses: str = ""


def text_batch() -> Batch:
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def classified(inputs: Callable[[], Batch]) -> Callable[[], Batch]:
    return lambda: {**inputs(), "labels": torch.arange(ROWS) % LABELS}


def token_batch() -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY, (ROWS, LENGTH))}


def pixel_batch() -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16)}


def pair_batch() -> Batch:
    return {**token_batch(), "labels": torch.randint(3, VOCABULARY, (ROWS, LENGTH - 2))}


def speech_batch() -> Batch:
    return {"input_features": torch.randn(ROWS, 10, 24), "labels": torch.randint(3, VOCABULARY, (ROWS, LENGTH))}


def wave_batch() -> Batch:
    return {"input_values": torch.randn(ROWS, 160), "labels": torch.randint(3, VOCABULARY, (ROWS, 4))}


def picture_and_text_batch() -> Batch:
    return {**token_batch(), **pixel_batch(), "return_loss": True}


def tagged_batch() -> Batch:
    return {**token_batch(), "labels": torch.randint(0, LABELS, (ROWS, LENGTH))}


def transformer(module: str, model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model of transformers from the fields of its config."""

    def make() -> nn.Module:
        kinds = import_module(f"transformers.models.{module}.modeling_{module}")
        settings = import_module(f"transformers.models.{module}.configuration_{module}")
        built: nn.Module = getattr(kinds, model)(getattr(settings, config)(**fields))
        return built

    return make


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input goes, thinned by a 1x1 one where the sizes differ."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.downsample = (
            None
            if (d_in, stride) == (d_out, 1)
            else nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride=stride, bias=False), nn.BatchNorm2d(d_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(own + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network of torch's own layers (He et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Residual(6, 6, 1), Residual(6, 10, 2))
        self.head = nn.Linear(10, LABELS)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))
        return answer(logits, labels)


class Tagger(nn.Module):
    """A label for every token, by an LSTM that reads in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 10)
        self.lstm = nn.LSTM(10, 6, batch_first=True, bidirectional=True)
        self.tag = nn.Linear(12, LABELS)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        states, _ = self.lstm(self.embed(input_ids))
        return answer(self.tag(states), labels)


def answer(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    if labels is None:
        return {"logits": logits}
    return {"loss": F.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


CLIP = {
    "text_config": {**TEXT, **BLOCKS, "max_position_embeddings": 16, "projection_dim": 12},
    "vision_config": {**PIXELS, "hidden_size": 20, "projection_dim": 12},
    "projection_dim": 12,
}
SEQUENCES = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_ffn_dim": 20,
    "decoder_start_token_id": 1,
    "init_std": SPREAD,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
WHISPER = {**SEQUENCES, "num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 16}
WAV2VEC2 = {
    **TEXT,
    **BLOCKS,
    "conv_dim": (8, 8),
    "conv_kernel": (6, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,  # so few frames cannot be masked
    "layerdrop": 0.0,
}
EXPERTS = {"num_experts_per_tok": 2}

ZOO: dict[str, Specimen] = {
    "gpt2": Specimen(
        "GPT-2",
        transformer("gpt2", "GPT2LMHeadModel", "GPT2Config", **TEXT, n_embd=16, n_inner=28, n_layer=2, n_head=2),
        text_batch,
    ),
    "llama": Specimen("LLaMA", transformer("llama", "LlamaForCausalLM", "LlamaConfig", **GROUPED), text_batch),
    "qwen2": Specimen(
        "Qwen 2, 2.5",
        transformer("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **DECODER, num_key_value_heads=1),
        text_batch,
    ),
    "qwen3": Specimen("Qwen 3", transformer("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **GROUPED), text_batch),
    "gemma": Specimen("Gemma", transformer("gemma", "GemmaForCausalLM", "GemmaConfig", **GROUPED), text_batch),
    "gemma3": Specimen(
        "Gemma 3",
        transformer("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, sliding_window=4),
        text_batch,
    ),
    "mistral": Specimen(
        "Mistral", transformer("mistral", "MistralForCausalLM", "MistralConfig", **GROUPED), text_batch
    ),
    "phi": Specimen("Phi-1, Phi-2", transformer("phi", "PhiForCausalLM", "PhiConfig", **DECODER), text_batch),
    "phi3": Specimen(
        "Phi-3", transformer("phi3", "Phi3ForCausalLM", "Phi3Config", **DECODER, num_key_value_heads=1), text_batch
    ),
    "gpt_neox": Specimen(
        "GPT-NeoX, Pythia", transformer("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER), text_batch
    ),
    "bloom": Specimen(
        "BLOOM",
        transformer("bloom", "BloomForCausalLM", "BloomConfig", **TEXT, hidden_size=16, n_layer=2, n_head=2),
        text_batch,
    ),
    "falcon": Specimen(
        "Falcon",
        transformer("falcon", "FalconForCausalLM", "FalconConfig", **DECODER, ffn_hidden_size=28),
        text_batch,
    ),
    "mixtral": Specimen(
        "Mixtral",
        transformer("mixtral", "MixtralForCausalLM", "MixtralConfig", **GROUPED, **EXPERTS, num_local_experts=4),
        text_batch,
    ),
    "qwen2_moe": Specimen(
        "Qwen-MoE",
        transformer(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **DECODER,
            **EXPERTS,
            num_key_value_heads=1,
            num_experts=4,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
        ),
        text_batch,
    ),
    "gpt_oss": Specimen(
        "GPT-OSS",
        transformer("gpt_oss", "GptOssForCausalLM", "GptOssConfig", **GROUPED, **EXPERTS, num_local_experts=4),
        text_batch,
    ),
    "mamba": Specimen(
        "Mamba",
        transformer(
            "mamba", "MambaForCausalLM", "MambaConfig", **TEXT, hidden_size=16, num_hidden_layers=2, state_size=4
        ),
        text_batch,
        peft_refuses="Module 'out_proj' is incompatible with Mamba-based models",
    ),
    "bert": Specimen(
        "BERT",
        transformer("bert", "BertForSequenceClassification", "BertConfig", **ENCODER),
        classified(token_batch),
    ),
    "distilbert": Specimen(
        "DistilBERT",
        transformer(
            "distilbert",
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **TEXT,
            dim=16,
            hidden_dim=28,
            n_layers=2,
            n_heads=2,
            num_labels=LABELS,
        ),
        classified(token_batch),
    ),
    "roberta": Specimen(
        "RoBERTa",
        transformer("roberta", "RobertaForSequenceClassification", "RobertaConfig", **ENCODER),
        classified(token_batch),
    ),
    "modernbert": Specimen(
        "ModernBERT",
        transformer(
            "modernbert",
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            **ENCODER,
            cls_token_id=1,
            sep_token_id=2,
        ),
        classified(token_batch),
    ),
    "t5": Specimen("T5", transformer("t5", "T5ForConditionalGeneration", "T5Config", **T5), pair_batch),
    "bart": Specimen(
        "BART",
        transformer(
            "bart",
            "BartForConditionalGeneration",
            "BartConfig",
            **SEQUENCES,
            max_position_embeddings=16,
            forced_eos_token_id=2,
        ),
        pair_batch,
    ),
    "whisper": Specimen(
        "Whisper",
        transformer("whisper", "WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        speech_batch,
    ),
    "wav2vec2": Specimen(
        "wav2vec 2.0", transformer("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", **WAV2VEC2), wave_batch
    ),
    "vit": Specimen(
        "ViT",
        transformer("vit", "ViTForImageClassification", "ViTConfig", **PIXELS, num_labels=LABELS),
        classified(pixel_batch),
    ),
    "clip": Specimen("CLIP", transformer("clip", "CLIPModel", "CLIPConfig", **CLIP), picture_and_text_batch),
    "resnet": Specimen(
        "ResNet (transformers)",
        transformer(
            "resnet",
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=6,
            hidden_sizes=[6, 10],
            depths=[1, 1],
            layer_type="basic",
            num_labels=LABELS,
        ),
        classified(pixel_batch),
        targets="convolution",
    ),
    "own_resnet": Specimen(
        "ResNet (torch)", ResNet, classified(pixel_batch), targets="stem,conv1,conv2,downsample.0,head"
    ),
    "lstm": Specimen(
        "LSTM tagger",
        Tagger,
        tagged_batch,
        peft_refuses="Target module LSTM(10, 6, batch_first=True, bidirectional=True)",
    ),
}


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return ZOO[name].make().eval()


def build(name: str) -> nn.Module:
    """Return a model of its own, in evaluation mode, with the same weights each time."""
    return deepcopy(_built(name))


def batch(name: str) -> Batch:
    """Return the fixed batch of a model."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return ZOO[name].batch()


def logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what the model says about a batch."""
    with torch.no_grad():
        out = model(**inputs)
    found: Tensor = out["logits"] if "logits" in out else out["logits_per_image"]
    return found
