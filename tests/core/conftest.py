"""Tiny real transformers models, built from configs: no file is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


def _llama(**fields: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **fields})).eval()


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        num_labels=3,
    )
    return RobertaForSequenceClassification(config).eval()


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=16)
    return DistilBertForSequenceClassification(config).eval()


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return ViTForImageClassification(config).eval()


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _roberta,
    "t5": _t5,
    "distilbert": _distilbert,
    "vit": _vit,
}


@pytest.fixture
def build(seed: int) -> Callable[..., nn.Module]:
    """Return a function that makes a tiny model of an architecture by name, in evaluation mode."""

    def make(name: str, **fields: object) -> nn.Module:
        torch.manual_seed(seed)
        return BUILDERS[name](**fields)

    return make


@pytest.fixture
def tokens(seed: int) -> torch.Tensor:
    """Return four rows of six tokens for the models of ``build``; none is a padding token."""
    return torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(seed))
