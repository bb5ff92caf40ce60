"""Small real tokenizers, trained on the spot, and chat templates in the styles that models have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "### User: what is it ### Assistant: yes it is, no it is not.",
    "Answer: yes. Question: what do you say? Answer: no, not yet.",
    "<|im_start|>user assistant system answer again\n\n",
] * 20
CONTROL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "inst": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
    ),
    "strips": (
        "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    # As models that think do it: an empty thought before the last answer, none before the earlier ones.
    "thinks-last": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thought-opened": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
}


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def bpe() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE whose tokens take a leading space in, as GPT-2's do; no BOS of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(word, special=True) for word in CONTROL]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer)


@pytest.fixture
def metaspace() -> PreTrainedTokenizerFast:
    """Return a BPE that puts a space before the start of every text and a BOS before it, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [AddedToken(word, special=True) for word in ["<unk>", *CONTROL]]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "a\nb\n\n"], trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return _finished(tokenizer)


@pytest.fixture
def templated(bpe: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a function that gives the byte-level tokenizer one of ``TEMPLATES``, or a template itself."""

    def with_template(style: str) -> PreTrainedTokenizerFast:
        bpe.chat_template = TEMPLATES.get(style, style)
        return bpe

    return with_template
