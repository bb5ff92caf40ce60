"""Tiny real models of several architectures, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ("<unk>", "</s>", "<pad>", *(f"word{i}" for i in range(29)))
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1}


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES))


def bert_classifier() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=5))


def roberta() -> PreTrainedModel:
    return RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=42))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=1, max_position_embeddings=64))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32, **SPECIAL))


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": bert,
    "bert-classifier": bert_classifier,
    "roberta": roberta,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
}


def build_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny model by its short name; ``special`` are the tokenizer's special tokens."""

    def save(kind: str, **special: str) -> Path:
        folder = tmp_path / kind
        MODELS[kind]().save_pretrained(folder)
        build_tokenizer(**(special or {"eos_token": "</s>", "pad_token": "<pad>"})).save_pretrained(folder)
        return folder

    return save
