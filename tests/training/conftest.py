"""Tiny real models in folders, rows that they can learn, and a function that fits them in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lorakit.training.fit import FitResult, fit

COLOURS = ("red", "green", "blue", "grey")
WORDS = ("the", "a", "is", "was", "house", "boat", "tree", "car", "sky", "old", "new", "very", "now", "here")
LINES = ("#", "Instruction", "Input", "Response", ":", "|", "user", "assistant", "name", "what")
VOCABULARY = ("<pad>", "</s>", "<unk>", "<cls>", "<sep>", "<mask>", *COLOURS, *WORDS, *LINES)
CHAT = (
    "{% for m in messages %}| {{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}| assistant : {% endif %}"
)
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
ENDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=64, pad_token_id=0))


def _llama(**fields: Any) -> PreTrainedModel:
    settings = {**SIZES, **ENDS, "num_hidden_layers": 2, "max_position_embeddings": 64, **fields}
    return LlamaForCausalLM(LlamaConfig(**settings))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _bert,
    "llama": _llama,
    "llama-chat": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-bf16": lambda: _llama().to(torch.bfloat16),
    "gpt2": _gpt2,
    "t5": _t5,
}


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: BERT's brackets, T5's end, no padding token for GPT-2."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if kind == "bert":
        words.post_processor = processors.BertProcessing(("<sep>", 4), ("<cls>", 3))
    if kind == "t5":
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    if kind == "gpt2":
        del special["pad_token"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False, **special)
    if kind == "llama-chat":
        tokenizer.chat_template = CHAT
    return tokenizer


def _gpt2_classifier() -> PreTrainedModel:
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **ENDS}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=len(VOCABULARY), num_labels=3, **settings))


def _bert_classifier() -> PreTrainedModel:
    settings = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return BertForSequenceClassification(BertConfig(num_labels=3, **settings))


@pytest.fixture
def build(seed: int) -> Callable[[str], PreTrainedModel]:
    """Return a function that makes a tiny model in evaluation mode; the classifiers have 3 classes."""

    def make(kind: str) -> PreTrainedModel:
        torch.manual_seed(seed)
        classifiers = {"bert": _bert_classifier, "gpt2-classifier": _gpt2_classifier}
        return {**MODELS, **classifiers}[kind]().eval()

    return make


@pytest.fixture
def tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a function that makes a model's tokenizer by its kind."""
    return tokenizer_for


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny model, one of ``MODELS``; read it only."""
    place = tmp_path_factory.mktemp("bases")

    def folder(kind: str) -> Path:
        path = place / kind
        if not path.is_dir():
            with torch.random.fork_rng():
                torch.manual_seed(7)
                MODELS[kind]().save_pretrained(path)
            tokenizer_for(kind).save_pretrained(path)
        return path

    return folder


def _sentence(draw: random.Random, *more: str) -> str:
    words = [*draw.choices(WORDS, k=draw.randint(2, 6)), *more]
    draw.shuffle(words)
    return " ".join(words)


def classified(count: int = 60, classes: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Return texts whose one colour is their label."""
    draw = random.Random(seed)
    colours = [COLOURS[i % classes] for i in range(count)]
    return [{"text": _sentence(draw, colour), "label": colour} for colour in colours]


def _pairs(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    found = []
    for i in range(count):
        colour = COLOURS[i % len(COLOURS)]
        found.append((_sentence(draw, colour), " ".join([colour] * draw.randint(1, 4))))
    return found


def prompted(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts whose colour is to be repeated, one to four times."""
    return [{"prompt": prompt, "completion": completion} for prompt, completion in _pairs(count, seed)]


def instructed(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Return the same as instructions, every other one with an input."""
    rows = []
    for i, (prompt, completion) in enumerate(_pairs(count, seed)):
        given = {"instruction": "what is", "input": prompt} if i % 2 else {"instruction": prompt, "input": ""}
        rows.append({**given, "output": completion})
    return rows


def talked(count: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """Return the same as conversations, every other one of two turns."""
    rows = []
    for i, (prompt, completion) in enumerate(_pairs(count, seed)):
        turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        rows.append({"messages": turn * (1 + i % 2)})
    return rows


def written(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Return plain texts that say each colour twice."""
    return [{"text": f"{prompt} {completion} {completion}"} for prompt, completion in _pairs(count, seed)]


ROWS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "classified": classified,
    "prompted": prompted,
    "instructed": instructed,
    "talked": talked,
    "written": written,
}


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Return a function that makes rows of a layout, one of ``ROWS``."""
    return lambda layout, *args, **settings: ROWS[layout](*args, **settings)


@pytest.fixture(scope="session")
def quick_fit(bases: Callable[[str], Path]) -> Callable[..., FitResult]:
    """Return ``fit`` for a tiny model by its kind and a layout's rows, with settings for seconds."""

    def run(kind: str = "bert", rows: Any = "classified", **settings: Any) -> FitResult:
        data = ROWS[rows]() if isinstance(rows, str) and rows in ROWS else rows
        quick = {"max_steps": 12, "lr": 5e-3, "batch_size": 8, "validation": 0.2}
        return fit(bases(kind), data, **{**quick, **settings})

    return run
