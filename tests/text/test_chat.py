"""Which tokens of a conversation are the assistant's, for templates of many styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError, ModelError
from lorakit.text.chat import (
    chat_passages,
    chat_prompt,
    chat_tokens,
    end_of_turn_ids,
    has_chat_template,
    message_problem,
)
from lorakit.text.messages import conversation
from lorakit.text.tokens import encode_passages

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
STYLES = ["chatml", "inst", "strips", "thinks-last", "thought-opened"]

LAST_ANSWER_ONLY = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
SHOUTS = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = talk((USER, "what is it?"), (ASSISTANT, "yes"), (USER, "again?"), (ASSISTANT, "no, not yet"))


def supervised(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """Return the supervised stretches as text, passage by passage."""
    stretches: list[list[int]] = []
    for ids, mask in encode_passages(tokenizer, chat_passages(tokenizer, conversation(messages))):
        for index, (token, kept) in enumerate(zip(ids, mask, strict=True)):
            if kept and (index == 0 or not mask[index - 1]):
                stretches.append([])
            if kept:
                stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", ["yes<|im_end|>", "no, not yet<|im_end|>"]),
        ("inst", [" yes </s>", " no, not yet </s>"]),
        ("strips", ["yes</s>", "no, not yet</s>"]),
        ("thinks-last", ["<think>\n\n</think>\n\nyes<|im_end|>", "<think>\n\n</think>\n\nno, not yet<|im_end|>"]),
        ("thought-opened", ["yes<|im_end|>", "no, not yet<|im_end|>"]),
    ],
)
def test_assistant_turns_are_supervised_up_to_their_end_mark(templated: Any, style: str, expected: list[str]) -> None:
    assert supervised(templated(style), TWO_TURNS) == expected


# 'strips' ends its prompt with a space, which the whole rendering would join to the answer's first token.
@pytest.mark.parametrize("style", [style for style in STYLES if style != "strips"])
def test_ids_are_those_of_the_whole_rendering(templated: Any, style: str) -> None:
    tokenizer = templated(style)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)

    ids, mask = chat_tokens(tokenizer, TWO_TURNS)

    assert ids == whole
    assert len(mask) == len(ids)


def test_no_token_joins_a_prompt_and_its_answer(templated: Any) -> None:
    """Generation starts from 'Assistant: ', so that 'yes' follows a space, though as one text it is ':', ' yes'."""
    tokenizer = templated("strips")

    ids, mask = chat_tokens(tokenizer, TWO_TURNS)

    starts = [i for i, kept in enumerate(mask) if kept and not mask[i - 1]]
    assert [tokenizer.decode(ids[start - 1 : start]) for start in starts] == [" ", " "]


def test_stripping_template_still_finds_a_padded_answer(templated: Any) -> None:
    padded = talk((USER, "what?"), (ASSISTANT, "  yes it is \n"))

    assert supervised(templated("strips"), padded) == ["yes it is</s>"]


def test_an_answer_that_repeats_the_question_is_found_in_its_own_turn(templated: Any) -> None:
    echo = talk((USER, "yes"), (ASSISTANT, "yes"), (USER, "yes"), (ASSISTANT, "yes"))

    _, mask = chat_tokens(templated("chatml"), echo)

    assert sum(mask) == 2 * len(templated("chatml").encode("yes<|im_end|>", add_special_tokens=False))
    assert mask[-2]
    assert not any(mask[:5])


def test_a_thought_that_the_template_takes_out_of_an_answer_to_learn_is_refused(templated: Any) -> None:
    messages = talk((USER, "what?"), (ASSISTANT, "<think>hm</think>yes"), (USER, "again?"), (ASSISTANT, "no"))

    with pytest.raises(DataError, match=r"message 2 \(assistant\) cannot be learned.*leaves out or rewrites.*thoughts"):
        supervised(templated("thinks-last"), messages)


def test_an_answer_of_no_weight_is_read_and_not_learned(templated: Any) -> None:
    messages = [*TWO_TURNS[:1], {**TWO_TURNS[1], "weight": 0}, *TWO_TURNS[2:]]

    assert supervised(templated("chatml"), messages) == ["no, not yet<|im_end|>"]


def test_a_greeting_answers_nothing_and_is_not_learned(templated: Any) -> None:
    assert supervised(templated("chatml"), [*talk((ASSISTANT, "hello")), *TWO_TURNS[:2]]) == ["yes<|im_end|>"]


@pytest.mark.parametrize("text", ["naïve ☕ 日本語", "zwei\n\nAbsätze", "🙂🙃"])
def test_answers_of_many_bytes_are_supervised_whole(templated: Any, text: str) -> None:
    assert supervised(templated("chatml"), talk((USER, "what?"), (ASSISTANT, text))) == [f"{text}<|im_end|>"]


def test_bos_of_the_template_is_not_doubled(metaspace: Any) -> None:
    metaspace.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )

    ids, _ = chat_tokens(metaspace, TWO_TURNS)

    assert ids.count(metaspace.bos_token_id) == 1
    assert ids[0] == metaspace.bos_token_id


def test_without_a_template_the_plain_one_has_bos_and_ends_with_eos(metaspace: Any) -> None:
    assert not has_chat_template(metaspace)

    ids, mask = chat_tokens(metaspace, TWO_TURNS)

    assert ids[0] == metaspace.bos_token_id
    assert (ids[-1], mask[-1]) == (metaspace.eos_token_id, True)
    assert ids.count(metaspace.eos_token_id) == 2


def test_plain_template_supervises_answers_alone(bpe: Any) -> None:
    assert supervised(bpe, [*talk((SYSTEM, "be kind")), *TWO_TURNS]) == ["yes</s>", "no, not yet</s>"]


def test_plain_template_needs_an_end_of_sequence_token(bpe: Any) -> None:
    bpe.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        chat_tokens(bpe, TWO_TURNS)


def test_answers_that_a_template_later_drops_are_learned_from_passages_of_their_own(templated: Any) -> None:
    tokenizer = templated(LAST_ANSWER_ONLY)

    passages = chat_passages(tokenizer, conversation(TWO_TURNS))

    assert [passage.text for passage in passages] == [
        "user: what is it?\nassistant: yes\n",
        "user: what is it?\nuser: again?\nassistant: no, not yet\n",
    ]
    assert supervised(tokenizer, TWO_TURNS) == [" yes\n", " no, not yet\n"]


def test_a_template_that_rewrites_answers_is_refused_by_turn(templated: Any) -> None:
    with pytest.raises(DataError, match=r"message 2 \(assistant\) cannot be learned.*rewrites a part of 'yes'"):
        chat_tokens(templated(SHOUTS), TWO_TURNS)


def test_what_the_template_refuses_is_told_with_its_reason(templated: Any) -> None:
    with pytest.raises(DataError, match="refuses messages 1 to 4: no system messages"):
        chat_tokens(templated("inst"), talk((USER, "what?"), (SYSTEM, "be kind"), (USER, "so?"), (ASSISTANT, "yes")))


def test_a_system_message_without_a_place_is_put_before_the_first_question(templated: Any) -> None:
    tokenizer = templated("inst")

    ids, _ = chat_tokens(tokenizer, [*talk((SYSTEM, "be kind")), *TWO_TURNS])

    assert tokenizer.decode(ids).startswith("<s>[INST] be kind\n\nwhat is it? [/INST] yes </s>")


@pytest.mark.parametrize("style", [*STYLES, ""])
def test_generation_prompt_is_where_the_first_answer_begins(templated: Any, style: str) -> None:
    tokenizer = templated(style)
    prompt, _ = encode_passages(tokenizer, [chat_prompt(tokenizer, TWO_TURNS[:3])])[0]

    text = tokenizer.decode(prompt)
    whole = tokenizer.decode(chat_tokens(tokenizer, TWO_TURNS)[0])

    assert whole.startswith(text)
    assert whole[len(text) :].lstrip().removeprefix("<think>\n\n</think>\n\n").startswith("no, not yet")


def test_a_chat_answer_ends_at_the_templates_mark_too(templated: Any) -> None:
    tokenizer = templated("chatml")

    assert end_of_turn_ids(tokenizer) == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (5, "must be a list"),
        (None, "no messages"),
        ([], "no messages"),
        (["hello"], "message 1 is not an object"),
        (talk(("asistant", "hello")), "message 1 has the role 'asistant'; known are.* Closest: 'assistant'"),
        ([{"role": USER, "content": None}], r"message 1 \(user\) has no text"),
        (talk((USER, "  ")), r"message 1 \(user\) has no text"),
        (talk((ASSISTANT, "hello")), "no assistant turn to learn"),
        (talk((USER, "a"), ("tool", "b")), r"message 2 \(tool\) follows one by 'user'"),
        (talk((SYSTEM, "a"), (USER, "b")), "no assistant turn"),
    ],
)
def test_what_is_no_conversation_is_refused_by_message(bpe: Any, messages: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        chat_tokens(bpe, messages)


def test_a_conversation_with_tools_and_a_last_question_is_well_formed() -> None:
    turns = talk((SYSTEM, "a"), (USER, "b"), (ASSISTANT, "c"), ("tool", "d"), (ASSISTANT, "e"), (USER, "f"))

    assert message_problem(turns) is None


def test_real_template_supervises_answers_and_their_end(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tiny-llama-en")

    assert supervised(tokenizer, TWO_TURNS) == ["yes</s>", "no, not yet</s>"]
    assert chat_tokens(tokenizer, TWO_TURNS)[0].count(tokenizer.bos_token_id) == 1
