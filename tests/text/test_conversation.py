"""Conversations: what is streamed is what generation writes, whoever answers and whatever was read before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters import attach
from lorakit.errors import InputError
from lorakit.methods.lora import LoRA
from lorakit.text.chat import end_of_turn_ids
from lorakit.text.conversation import Conversation, Form, Settings, Voice
from lorakit.text.generate import generate, stream_tokens
from lorakit.text.streaming import Past, Spelling

QUESTIONS = ("what is it?", "do you say yes?", "no, not yet")
SHORT = Settings(max_new_tokens=9)
EMOJI = "naïve 你好世界 👩‍👩‍👧 🇩🇪 is\n\n  it — “yes”\ttab"


def tiny(kind: str, tokenizer: Any, **more: Any) -> Any:
    """Return a small random model; its weights are wide apart, so that no two tokens are nearly as likely."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    usual = {**ends, **sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.5}
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**usual, num_key_value_heads=2, sliding_window=8)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, initializer_range=0.5, **ends)
        return GPT2LMHeadModel(config).eval()
    if kind == "t5":
        sides = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "initializer_factor": 5.0}
        start = {"decoder_start_token_id": tokenizer.pad_token_id}
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sides, **start, **ends)).eval()
    return LlamaForCausalLM(LlamaConfig(**(usual | more))).eval()


def adapted(model: Any) -> Any:
    """Attach an adapter that changes what is written."""
    handle = attach(model, LoRA(rank=4), "all-linear", seed=0)
    for update in handle.updates().values():
        torch.nn.init.normal_(update.B, std=0.5)
    return handle


def said(talk: Conversation, question: str, voice: Voice | None = None, keep: bool = True) -> str:
    """Return the pieces of an answer, joined."""
    return "".join(talk.reply(question, voice, keep))


def fresh(model: Any, tokenizer: Any, talk: Conversation, question: str) -> str:
    """Answer from the messages alone, with ``generate``."""
    messages = [*talk.messages, {"role": "user", "content": question}]
    return generate(model, tokenizer, [messages], SHORT.max_new_tokens, chat=True)[0]


@pytest.mark.parametrize("style", ["chatml", "strips", "thinks-last", "thought-opened", None])
@pytest.mark.parametrize("reuse", [True, False], ids=["cache", "no-cache"])
def test_greedy_answers_are_those_of_generate(
    bpe: Any, templated: Callable[[str], Any], style: str | None, reuse: bool
) -> None:
    tokenizer = templated(style) if style else bpe
    model = tiny("llama", tokenizer)
    talk = Conversation(model, tokenizer, settings=SHORT, system="you say yes", reuse=reuse)

    expected, written = [], []
    for question in QUESTIONS:
        expected.append(fresh(model, tokenizer, talk, question))
        written.append(said(talk, question).strip())

    assert written == expected
    assert any(written)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "t5"])
def test_reading_on_writes_the_same_tokens_as_reading_all(templated: Callable[[str], Any], kind: str) -> None:
    tokenizer = templated("chatml")
    model = tiny(kind, tokenizer)
    one, other = (Conversation(model, tokenizer, settings=SHORT, reuse=reuse) for reuse in (True, False))

    assert [said(one, question) for question in QUESTIONS] == [said(other, question) for question in QUESTIONS]
    assert one.last is not None
    assert (one.last.reused > 0) is (
        kind in ("llama", "gpt2")
    )  # a sliding window is not cut back, an encoder reads all
    assert other.last is not None
    assert other.last.reused == 0


def test_only_what_is_new_is_read_again(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    talk = Conversation(tiny("llama", tokenizer), tokenizer, settings=Settings(max_new_tokens=1))
    said(talk, QUESTIONS[0])
    first = talk.last
    said(talk, QUESTIONS[0], keep=False)

    assert first is not None
    assert talk.last is not None
    assert first.reused == 0
    assert talk.last.reused >= first.prompt_tokens - 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_more_tokens_behind_those_read_are_read_on_from(bpe: Any, kind: str) -> None:
    model, past = tiny(kind, bpe), Past()
    prompt = bpe(" ".join(QUESTIONS)).input_ids
    longer = prompt + list(stream_tokens(model, bpe, prompt, 9, past=past)) + bpe(QUESTIONS[0]).input_ids
    written = list(stream_tokens(model, bpe, longer, 9, past=past))

    assert past.reused == len(longer) - len(bpe(QUESTIONS[0]).input_ids) - 1
    assert written == list(stream_tokens(model, bpe, longer, 9))


def test_rotary_frequencies_that_follow_the_length_are_never_read_on_from(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", tokenizer, rope_parameters=rope, max_position_embeddings=128)
    talk = Conversation(model, tokenizer, settings=SHORT)
    said(talk, QUESTIONS[0])
    said(talk, QUESTIONS[1])

    assert talk.last is not None
    assert talk.last.reused == 0


def test_a_voice_changed_on_the_way_answers_as_in_a_run_of_its_own(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    model = tiny("llama", tokenizer)
    handle = adapted(model)
    voices = [
        Voice("adapter", lambda: handle.using("default")),
        Voice("base", handle.disabled),
        Voice("adapter", lambda: handle.using("default")),
        Voice("half", lambda: handle.using({"default": 0.5})),
        Voice("adapter", lambda: handle.using("default")),
    ]
    talk = Conversation(model, tokenizer, settings=SHORT)

    expected, written = [], []
    for number, voice in enumerate(voices):
        question = QUESTIONS[number % 3]
        with voice.acts():
            expected.append(fresh(model, tokenizer, talk, question))
        written.append(said(talk, question, voice).strip())

    assert written == expected
    assert talk.last is not None
    assert talk.last.reused > 0


def test_what_only_the_last_two_voices_read_is_kept(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    talk = Conversation(tiny("llama", tokenizer), tokenizer, settings=SHORT)
    reused = []
    for name in ("a", "b", "a", "c", "a", "b"):
        said(talk, QUESTIONS[0], Voice(name), keep=False)
        assert talk.last is not None
        reused.append(talk.last.reused > 0)

    assert reused == [False, False, True, False, True, False]


def test_the_same_question_to_both_is_answered_by_both_and_kept_once(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    model = tiny("llama", tokenizer)
    handle = adapted(model)
    talk = Conversation(model, tokenizer, settings=SHORT)
    base = said(talk, QUESTIONS[0], Voice("base", handle.disabled), keep=False)
    own = said(talk, QUESTIONS[0], Voice("adapter"))

    assert base != own
    assert [turn["content"] for turn in talk.turns] == [QUESTIONS[0], own.strip()]


@pytest.mark.parametrize("family", ["bpe", "metaspace"])
@pytest.mark.parametrize("text", [EMOJI, "what is it? yes\nno", " answer", "\ud7ff\U0001f600"])
def test_pieces_join_to_the_whole_text(request: pytest.FixtureRequest, family: str, text: str) -> None:
    tokenizer = request.getfixturevalue(family)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    spelling = Spelling(tokenizer)
    pieces = [*(spelling.add(token) for token in ids), spelling.finish()]

    assert "".join(pieces) == spelling.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])


def test_a_character_comes_when_its_last_byte_does(bpe: Any) -> None:
    ids = bpe("👩", add_special_tokens=False).input_ids
    spelling = Spelling(bpe)

    assert [spelling.add(token) for token in ids] == ["", "", "", "👩"]


def test_a_character_that_never_ends_is_given_out_at_the_end(bpe: Any) -> None:
    ids = bpe("it 👩", add_special_tokens=False).input_ids[:-1]
    spelling = Spelling(bpe)
    pieces = [spelling.add(token) for token in ids]

    assert "".join(pieces) == "it "
    assert "it " + spelling.finish() == bpe.decode(ids)


def test_text_stops_before_a_mark_and_never_shows_its_beginning(bpe: Any) -> None:
    spelling = Spelling(bpe, ("\n### User:",))
    ids = bpe("yes\n### no\n### User: what", add_special_tokens=False).input_ids
    pieces = [spelling.add(token) for token in ids]

    assert "".join(pieces) == "yes\n### no"
    assert spelling.over
    assert spelling.finish() == ""


def constant(model: Any, token: int) -> Any:
    """Make a model write one token for ever."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[token] = 1.0
    return model


@pytest.mark.parametrize("word", ["<|im_end|>", "</s>"])
def test_an_answer_ends_at_the_end_of_turn_or_sequence(templated: Callable[[str], Any], word: str) -> None:
    tokenizer = templated("chatml")
    mark = tokenizer.convert_tokens_to_ids(word)
    assert mark in end_of_turn_ids(tokenizer)
    talk = Conversation(constant(tiny("llama", tokenizer), mark), tokenizer, settings=SHORT)

    assert said(talk, "what?") == ""
    assert talk.last is not None
    assert (talk.last.ended, talk.last.tokens, talk.last.kept) == ("end", 1, False)
    assert talk.turns == []


def test_an_answer_is_cut_where_the_context_ends(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    model = constant(tiny("llama", tokenizer, max_position_embeddings=40), 100)
    talk = Conversation(model, tokenizer)
    said(talk, "no")

    assert talk.last is not None
    assert talk.last.ended == "context"
    assert talk.last.tokens + talk.last.prompt_tokens == 40
    with pytest.raises(InputError, match="leaves no room for an answer"):
        said(talk, "no")
    talk.reset()
    assert said(talk, "no")


def test_a_stopped_answer_is_kept_as_far_as_it_came(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    model = constant(tiny("llama", tokenizer), tokenizer("yes", add_special_tokens=False).input_ids[0])
    talk = Conversation(model, tokenizer, settings=Settings(max_new_tokens=200))
    states: list[str] = []

    @contextlib.contextmanager
    def acting() -> Iterator[None]:
        states.append("on")
        try:
            yield
        finally:
            states.append("off")

    with contextlib.closing(talk.reply("what?", Voice("slow", acting))) as pieces:
        begun = next(pieces) + next(pieces)

    assert talk.last is not None
    assert (talk.last.ended, talk.last.text, talk.last.kept) == ("interrupted", begun, True)
    assert talk.last.tokens < 200
    assert states == ["on", "off"]
    assert said(talk, "and?", keep=False)


def test_a_seeded_answer_is_the_one_that_generate_draws(templated: Callable[[str], Any]) -> None:
    tokenizer = templated("chatml")
    model = tiny("llama", tokenizer)
    settings = Settings(max_new_tokens=8, temperature=2.0, seed=3)
    talk = Conversation(model, tokenizer, settings=settings)
    drawn = generate(model, tokenizer, ["what?"], 8, chat=True, temperature=2.0, seed=3)

    assert said(talk, "what?").strip() == drawn[0]


def test_single_prompts_are_written_as_in_training_and_not_remembered(bpe: Any, tmp_path: Path) -> None:
    model = tiny("llama", bpe)
    form = Form(chat=False, worded=lambda text: f"Question: {text} Answer:", columns=("instruction", "output"))
    talk = Conversation(model, bpe, form, SHORT)
    written = [said(talk, question) for question in QUESTIONS]

    assert written == generate(model, bpe, [form.worded(question) for question in QUESTIONS], SHORT.max_new_tokens)
    talk.save(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, written, strict=True) if a.strip()]
    with pytest.raises(InputError, match="no place for one"):
        talk.tell("be kind")


def test_a_saved_conversation_is_replaced_only_when_asked(templated: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizer = templated("chatml")
    talk = Conversation(tiny("llama", tokenizer), tokenizer, settings=SHORT, system="say 你好")
    file = tmp_path / "talk.jsonl"
    with pytest.raises(InputError, match="nothing has been said"):
        talk.save(file)
    said(talk, "what?")
    file.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        talk.save(file)
    assert file.read_text() == "mine"
    assert talk.save(file, force=True) == 1
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": talk.messages}
    assert [entry.name for entry in tmp_path.iterdir()] == ["talk.jsonl"]


@pytest.mark.parametrize("question", ["", "  \n", "half \ud83d"])
def test_a_question_without_text_is_refused_and_changes_nothing(templated: Callable[[str], Any], question: str) -> None:
    tokenizer = templated("chatml")
    talk = Conversation(tiny("llama", tokenizer), tokenizer)
    with pytest.raises(InputError, match="the question"):
        said(talk, question)
    assert talk.turns == []
