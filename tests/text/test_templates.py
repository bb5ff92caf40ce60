"""Templates in the manner of well-known models: what is learned, and that generation starts where training did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lorakit.errors import DataError
from lorakit.text.chat import chat_passages, chat_prompt, end_of_turn_ids
from lorakit.text.messages import conversation
from lorakit.text.template import moves_system, never_ends_a_turn, template_facts
from lorakit.text.tokens import encode_passages

from .templates import CHATML, GEMMA, MISTRAL, PUBLISHED, QWEN_3

MARKS = ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|Assistant|>", "<|User|>"]
CONTENTS = ["yes", "  no\n", "<b>what</b> is it?", "naïve ☕", "a\n\nb", "yes yes"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": None}}}
WITH_TOOLS = [
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def published(bpe: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a function that gives a tokenizer the template of a kind of model, whose marks are its special tokens."""
    bpe.add_tokens([AddedToken(mark, special=True) for mark in MARKS])

    def with_template(kind: str) -> PreTrainedTokenizerFast:
        bpe.chat_template = PUBLISHED.get(kind, kind)
        return bpe

    return with_template


def talk(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def learned(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    passages = chat_passages(tokenizer, conversation(messages, tools))
    return [passage.text[start:end] for passage in passages for start, end in passage.spans]


@pytest.mark.parametrize(
    ("kind", "end", "opening"),
    [
        ("chatml", "<|im_end|>", ""),
        ("llama-2", " </s>", " "),
        ("llama-3", "<|eot_id|>", ""),
        ("mistral", "</s>", " "),
        ("gemma", "<end_of_turn>", ""),
        ("phi-3", "<|end|>", ""),
        ("zephyr", "</s>", ""),
        ("deepseek-r1", "</s>", ""),
        ("qwen-3", "<|im_end|>", "<think>\n\n</think>\n\n"),
        ("marked", "<|im_end|>", ""),
        ("headings", "</s>", " "),
    ],
)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_every_answer_and_its_end_are_learned_once(
    published: Any, kind: str, end: str, opening: str, system: str | None
) -> None:
    found = learned(published(kind), talk("what?", "yes", "again?", "no, not yet", system=system))

    assert found == [f"{opening}yes{end}", f"{opening}no, not yet{end}"]


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("shift", range(len(CONTENTS)))
def test_each_answer_is_trained_behind_the_tokens_that_generation_starts_from(
    published: Any, kind: str, system: str | None, shift: int
) -> None:
    tokenizer = published(kind)
    contents = (CONTENTS * 2)[shift : shift + 6]
    messages = talk(*contents, system=system)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    trained = []
    for ids, mask in encode_passages(tokenizer, chat_passages(tokenizer, conversation(messages))):
        starts = [i for i, kept in enumerate(mask) if kept and not mask[i - 1]]
        trained += [ids[:start] for start in starts]
    asked = [encode_passages(tokenizer, [chat_prompt(tokenizer, messages[:place])])[0][0] for place in places]

    assert trained == asked


@pytest.mark.parametrize("kind", ["chatml", "llama-2", "gemma", "qwen-3", "headings"])
def test_the_same_holds_for_a_tokenizer_that_puts_a_space_before_a_text(metaspace: Any, kind: str) -> None:
    metaspace.chat_template = PUBLISHED[kind]
    messages = talk("what is it?", "yes it is", "again?", " no, not yet")

    trained = []
    for ids, mask in encode_passages(metaspace, chat_passages(metaspace, conversation(messages))):
        trained += [ids[:i] for i, kept in enumerate(mask) if kept and not mask[i - 1]]
    asked = [encode_passages(metaspace, [chat_prompt(metaspace, messages[:place])])[0][0] for place in (1, 3)]

    assert trained == asked


@pytest.mark.parametrize("kind", PUBLISHED)
def test_generation_stops_at_the_mark_that_is_trained(published: Any, kind: str) -> None:
    tokenizer = published(kind)
    for ids, mask in encode_passages(tokenizer, chat_passages(tokenizer, conversation(talk("what?", "yes")))):
        last = max(i for i, kept in enumerate(mask) if kept)

        assert ids[last] in end_of_turn_ids(tokenizer)


@pytest.mark.parametrize(("kind", "moved"), [("gemma", True), ("mistral", True), ("llama-2", False), ("chatml", False)])
def test_where_a_system_message_has_no_place_it_is_said(published: Any, kind: str, moved: bool) -> None:
    assert moves_system(published(kind), conversation(talk("a", "b", system="be kind"))) is moved


@pytest.mark.parametrize("template", [GEMMA, MISTRAL])
def test_a_system_message_without_a_place_is_read_before_the_first_question(published: Any, template: str) -> None:
    (passage,) = chat_passages(published(template), conversation(talk("a", "b", "c", "d", system="be kind")))

    assert "be kind\n\na" in passage.text
    assert passage.text.count("be kind") == 1


def test_roles_that_a_template_refuses_are_told(published: Any) -> None:
    messages = [{"role": "user", "content": "a"}, *talk("b", "c")]

    with pytest.raises(DataError, match="refuses messages 1 to 3: Conversation roles must alternate"):
        chat_passages(published("gemma"), conversation(messages))


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nhm\n</think>\n\nyes"},
        {"content": "<think>hm</think>yes"},
        {"content": "yes", "reasoning_content": "hm"},
    ],
)
def test_a_thought_is_learned_with_the_answer_it_led_to(published: Any, answer: dict[str, str]) -> None:
    messages = [*talk("a"), {"role": "assistant", **answer}, *talk("c", "d")]

    assert learned(published("qwen-3"), messages) == [
        "<think>\nhm\n</think>\n\nyes<|im_end|>",
        "<think>\n\n</think>\n\nd<|im_end|>",
    ]


def test_a_thought_is_not_in_what_later_answers_are_learned_from(published: Any) -> None:
    messages = talk("a", "<think>hm</think>yes", "c", "d")

    first, last = chat_passages(published("qwen-3"), conversation(messages))
    assert ("hm" in first.text, "hm" in last.text) == (True, False)


@pytest.mark.parametrize("answer", [{"content": "<think>hm</think>yes"}, {"content": "yes", "reasoning_content": "hm"}])
def test_a_thought_that_a_template_never_writes_is_refused_with_advice(published: Any, answer: dict[str, str]) -> None:
    messages = [*talk("a"), {"role": "assistant", **answer}]

    with pytest.raises(DataError, match=r"message 2 \(assistant\) cannot be learned: .*leaves out.*use a model whose"):
        chat_passages(published("deepseek-r1"), conversation(messages))


def test_calls_of_tools_are_learned_and_their_results_are_not(published: Any) -> None:
    assert learned(published("qwen-3"), WITH_TOOLS, [WEATHER]) == [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "get_weather", '
        '"arguments": {"city": "Oslo", "days": null}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nyes<|im_end|>",
    ]


def test_tools_are_told_to_the_model(published: Any) -> None:
    passages = chat_passages(published("qwen-3"), conversation(WITH_TOOLS, [WEATHER]))

    assert all('"description": "Tell the weather."' in passage.text for passage in passages)


def test_generation_is_told_of_tools_as_training_was(published: Any) -> None:
    tokenizer = published("qwen-3")
    passages = chat_passages(tokenizer, conversation(WITH_TOOLS, [WEATHER]))

    asked = chat_prompt(tokenizer, WITH_TOOLS[:3], [WEATHER])
    assert passages[-1].text[: passages[-1].spans[-1][0]] == asked.text


@pytest.mark.parametrize(
    ("messages", "tools", "problem"),
    [
        (WITH_TOOLS, None, "does not write its call of 'get_weather'"),
        (talk("a", "b"), [WEATHER], r"does not tell the model of its tools \(such as 'get_weather'\)"),
    ],
)
def test_a_template_without_tools_is_said(
    published: Any, messages: list[dict[str, Any]], tools: Any, problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        chat_passages(published(CHATML), conversation(messages, tools))


def test_the_template_for_tools_is_taken_where_there_are_several(bpe: Any) -> None:
    bpe.chat_template = {"default": CHATML, "tool_use": QWEN_3}

    assert "<tools>" in chat_passages(bpe, conversation(WITH_TOOLS, [WEATHER]))[-1].text
    assert learned(bpe, talk("a", "b")) == ["b<|im_end|>"]


def test_without_a_template_calls_and_tools_are_written_as_json(bpe: Any) -> None:
    (passage,) = chat_passages(bpe, conversation(WITH_TOOLS, [WEATHER]))

    assert passage.text.startswith('### Tools:\n{"name": "get_weather"')
    assert learned(bpe, WITH_TOOLS, [WEATHER]) == [
        '{"name": "get_weather", "arguments": {"city": "Oslo", "days": null}}</s>',
        "yes</s>",
    ]


def test_a_template_that_leaves_out_results_of_tools_is_refused(published: Any) -> None:
    knows_no_tools = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    messages = [*talk("a", "b"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "c"}]

    with pytest.raises(DataError, match=r"leaves out message 3 \(tool\)"):
        chat_passages(published(knows_no_tools), conversation(messages))


@pytest.mark.parametrize(
    ("template", "never"),
    [(CHATML, False), ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", True)],
)
def test_a_template_that_never_ends_a_turn_is_found(published: Any, template: str, never: bool) -> None:
    assert never_ends_a_turn(published(template)) is never


def test_what_closes_a_whole_conversation_is_no_part_of_an_answer(published: Any) -> None:
    facts = template_facts(published("phi-3"))

    assert (facts.closing, facts.footer) == ("<|end|>", "</s>")


def test_marks_of_the_template_say_what_is_learned(published: Any) -> None:
    """The marks leave the end of the turn out, which comparing renderings would take in."""
    marks_words_only = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    assert learned(published(marks_words_only), talk("a", "yes", "b", "no")) == ["yes", "no"]


@pytest.mark.parametrize(
    ("given", "role", "content"),
    [
        ({"from": "human", "value": "hi"}, "user", "hi"),
        ({"from": "gpt", "value": "hi"}, "assistant", "hi"),
        ({"from": "Human", "value": "hi"}, "user", "hi"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user", "ab"),
        ({"role": "developer", "content": "hi"}, "developer", "hi"),
    ],
)
def test_messages_of_other_shapes_are_read_as_one(given: dict[str, Any], role: str, content: str) -> None:
    (message,) = conversation([given], answered=False).messages

    assert message == {"role": role, "content": content}


@pytest.mark.parametrize(
    "call",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {"x": 1}}]'},
    ],
)
def test_calls_of_all_shapes_are_read_as_one(call: dict[str, Any]) -> None:
    observed = {"from": "observation", "value": "2"}
    messages = conversation([*talk("a"), call, observed, {"from": "gpt", "value": "two"}]).messages

    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"from": "function_call", "value": "f(1)"}, "calls no tool.*Expecting value"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "calls no tool"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}, "arguments are not JSON"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(call: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=rf"message 2 \(assistant\).*{problem}"):
        conversation([*talk("a"), call])


def test_a_developers_message_is_a_system_message_where_the_template_knows_no_developer(published: Any) -> None:
    messages = [{"role": "developer", "content": "be kind"}, *talk("a", "b")]

    (passage,) = chat_passages(published("chatml"), conversation(messages))
    assert passage.text.startswith("<|im_start|>system\nbe kind<|im_end|>")
