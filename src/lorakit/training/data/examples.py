"""One row as an example: what the model is given and what it is to write, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.text import supervise
from lorakit.text.messages import Conversation, Message, Problem, read_conversation
from lorakit.training.data.layouts import MESSAGES, Detection
from lorakit.training.data.table import Row


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; ``talk`` is the conversation, where it is one."""

    prompt: str
    completion: str
    talk: Conversation | None = None


def read_example(row: Row, detection: Detection, chat: bool) -> Example:
    """Return a row's prompt and completion, of a conversation its first learned answer and what stands before it.

    Args:
        row: one that ``row_problem`` finds nothing wrong with.
        detection: the layout.
        chat: prompts are written as a user's messages.
    """
    if detection.layout == MESSAGES:
        talk = row_conversation(row, detection)
        assert isinstance(talk, Conversation)
        first = talk.learned[0]
        return Example(talk.messages[first - 1]["content"], said(talk.messages[first]), talk)
    if detection.layout == "instruction-output":
        instruction, given = detection.value(row, "instruction"), detection.value(row, "input") or ""
        write = supervise.instruction_message if chat else supervise.instruction_prompt
        return Example(write(instruction, given), detection.value(row, "output"))
    return Example(detection.value(row, "prompt"), detection.value(row, "completion"))


def row_conversation(row: Row, detection: Detection) -> Conversation | Problem:
    """Return the row's conversation, or what is wrong with it."""
    system, tools = detection.value(row, "system"), detection.value(row, "tools")
    if "messages" in detection.columns:
        return read_conversation(detection.value(row, "messages"), tools, system)
    turns = _earlier(detection.value(row, "history"))
    if isinstance(turns, Problem):
        return turns
    prompt, answer = detection.value(row, "prompt"), detection.value(row, "completion")
    if "instruction" in detection.columns:
        given = detection.value(row, "input") or ""
        prompt = supervise.instruction_message(detection.value(row, "instruction"), given)
        answer = detection.value(row, "output")
    if isinstance(prompt, (list, tuple)):
        # What is given is not learned, also where the assistant said it.
        turns += [{**turn, "weight": 0} if isinstance(turn, Mapping) else turn for turn in prompt]
    else:
        turns.append({"role": "user", "content": prompt})
    turns += list(answer) if isinstance(answer, (list, tuple)) else [{"role": "assistant", "content": answer}]
    return read_conversation(turns, None, system)


def _earlier(history: object) -> list[Any] | Problem:
    """Return alpaca's history, pairs of what was said and answered, as messages."""
    turns: list[Message] = []
    wrong = Problem("'history' is not a list of [question, answer] pairs")
    if history is None or history == "":
        return turns
    if not isinstance(history, (list, tuple)):
        return wrong
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return wrong
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def said(message: Message) -> str:
    """Return what a message says, or the calls that it makes."""
    calls = ", ".join(call["function"]["name"] for call in message.get("tool_calls", ()))
    return str(message["content"]) if message["content"].strip() or not calls else f"(calls {calls})"


def input_text(row: Row, detection: Detection) -> str:
    """Return all that the model is given of a row, as one text: what makes two examples the same."""
    if detection.layout == MESSAGES:
        talk = row_conversation(row, detection)
        turns = talk.messages[: talk.learned[0]] if isinstance(talk, Conversation) else ()
        return "\n".join(f"{turn['role']}: {said(turn)}" for turn in turns)
    names = ("text", "text_pair", "prompt", "instruction", "input")
    given = (detection.value(row, name) for name in names)
    return "\n".join(str(value) for value in given if value)
