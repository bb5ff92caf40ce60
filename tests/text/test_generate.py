"""Generation from prompts: only new text, the same in batches, nothing of the model changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import InputError
from lorakit.text.generate import context_length, generate, stream
from lorakit.text.supervise import prompt_tokens

PROMPTS = ["what is it?", "no", "Answer: yes. Question: what do you say?"]


@pytest.fixture
def llama(bpe: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bpe),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=bpe.bos_token_id,
        eos_token_id=bpe.eos_token_id,
        pad_token_id=bpe.pad_token_id,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def t5(bpe: Any) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(bpe),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=bpe.pad_token_id,
        eos_token_id=bpe.eos_token_id,
        pad_token_id=bpe.pad_token_id,
        initializer_factor=5.0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """Collect what ``transformers`` logs as a warning."""
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    transformers_logging.add_handler(handler)
    yield messages
    transformers_logging.remove_handler(handler)


def by_hand(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """Take the likeliest next token ``count`` times, without a cache, padding or batch."""
    ids = prompt_tokens(tokenizer, prompt)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_greedy_batches_equal_decoding_by_hand(llama: Any, bpe: Any) -> None:
    texts = generate(llama, bpe, PROMPTS, max_new_tokens=6, batch_size=2)

    assert texts == [by_hand(llama, bpe, prompt, 6) for prompt in PROMPTS]


def test_streamed_pieces_join_to_the_generated_text(llama: Any, bpe: Any) -> None:
    pieces = list(stream(llama, bpe, PROMPTS[0], max_new_tokens=12))

    assert "".join(pieces) == generate(llama, bpe, PROMPTS[:1], max_new_tokens=12)[0]
    assert all(pieces)


def test_encoder_decoder_writes_and_streams_the_same(t5: Any, bpe: Any) -> None:
    texts = generate(t5, bpe, PROMPTS, max_new_tokens=6)

    assert texts[0] == "".join(stream(t5, bpe, PROMPTS[0], max_new_tokens=6))
    assert any(texts)


def test_training_mode_of_every_module_is_restored(llama: Any, bpe: Any) -> None:
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]

    generate(llama, bpe, PROMPTS[:1], max_new_tokens=2)

    assert [module.training for module in llama.modules()] == before


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_defaults_of_the_model_cause_no_warning_and_stay(
    llama: Any, bpe: Any, transformers_log: list[str], temperature: float
) -> None:
    llama.generation_config.do_sample = True
    llama.generation_config.temperature = 0.6
    llama.generation_config.top_p = 0.9
    llama.generation_config.max_length = 50
    before = llama.generation_config.to_dict()

    generate(llama, bpe, PROMPTS, max_new_tokens=3, temperature=temperature)
    list(stream(llama, bpe, PROMPTS[0], max_new_tokens=3, temperature=temperature))

    assert transformers_log == []
    assert llama.generation_config.to_dict() == before


def test_seeded_sampling_repeats_and_leaves_the_generator_alone(llama: Any, bpe: Any) -> None:
    state = torch.get_rng_state()

    first = generate(llama, bpe, PROMPTS, max_new_tokens=8, temperature=2.0, seed=3)
    second = generate(llama, bpe, PROMPTS, max_new_tokens=8, temperature=2.0, seed=3)
    other = generate(llama, bpe, PROMPTS, max_new_tokens=8, temperature=2.0, seed=4)

    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chat_answer_stops_at_the_end_of_its_turn(llama: Any, templated: Any) -> None:
    tokenizer = templated("chatml")
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.model.norm.weight.fill_(1.0)
    bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with torch.no_grad():
        bias[mark] = 1.0
    llama.lm_head.bias = bias

    assert generate(llama, tokenizer, ["what?"], max_new_tokens=8, chat=True) == [""]


def test_a_prompt_too_long_for_the_context_is_refused_with_its_counts(llama: Any, bpe: Any) -> None:
    long = "no " * 80
    count = len(prompt_tokens(bpe, long))

    with pytest.raises(InputError, match=rf"prompt 2 has {count} tokens; with 10 new ones .* room for 54"):
        generate(llama, bpe, ["no", long], max_new_tokens=10)
    with pytest.raises(InputError, match="leaves room for 54"):
        next(stream(llama, bpe, long, max_new_tokens=10))


def test_a_failure_in_the_streaming_thread_reaches_the_reader(llama: Any, bpe: Any) -> None:
    llama.model.embed_tokens = torch.nn.Embedding(2, 32)

    with pytest.raises(IndexError):
        list(stream(llama, bpe, "what?", max_new_tokens=4))


def test_a_closed_stream_stops_the_model(llama: Any, bpe: Any) -> None:
    llama.generation_config.eos_token_id = None
    llama.train()
    pieces = stream(llama, bpe, "what?", max_new_tokens=40)
    next(pieces)
    pieces.close()

    assert llama.training


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": -1.0, "max_new_tokens": 4}, "temperature is -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused(llama: Any, bpe: Any, settings: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        generate(llama, bpe, ["what?"], **settings)


def test_context_length_is_found_under_each_models_name(llama: Any, t5: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=1, vocab_size=8))

    assert (context_length(llama), context_length(gpt2), context_length(t5)) == (64, 32, None)


def test_the_real_model_writes_words(shared: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "tiny-llama-en"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    (text,) = generate(model, tokenizer, ["Once upon a time there was"], max_new_tokens=12)

    assert len(text.split()) > 4
    assert "Once upon" not in text
