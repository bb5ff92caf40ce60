"""Conversations in the shapes that people keep them in, read as one shape: OpenAI's.

    OpenAI      {"role": "user", "content": "..."}; content may be a list of {"type": "text", "text": ...}
    ShareGPT    {"from": "human", "value": "..."}, with 'gpt', 'function_call', 'observation' for the others

A message with ``"weight": 0`` (OpenAI's name; or ``"train": false``) is read by the model and not learned.
An answer is learned if a question or a tool's result stands before it: a greeting answers nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import DataError, did_you_mean, quoted
from lorakit.text.tokens import text_problem

Messages = Sequence[Mapping[str, Any]]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_NAMES = {
    **{name: name for name in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row; ``skip``: it is whole but teaches nothing, so that it may be left out."""

    text: str
    skip: bool = False


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's shape, and the tools that the model is told of.

    Attributes:
        messages: ``role``, ``content`` (a text), and where they have them ``tool_calls`` with arguments as objects,
            ``name``, ``tool_call_id``, ``reasoning_content``.
        tools: function descriptions, or None.
        learned: the numbers (from 0) of the messages that are supervised.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    learned: tuple[int, ...] = ()


class _UnreadableError(DataError):
    """Carries a problem up to ``read_conversation``; never leaves this file."""

    def __init__(self, text: str, skip: bool = False) -> None:
        super().__init__(text)
        self.problem = Problem(text, skip)


def read_conversation(
    messages: object, tools: object = None, system: object = None, answered: bool = True
) -> Conversation | Problem:
    """Read a conversation, or say what is wrong with it.

    Args:
        messages: a list of messages in one of the shapes above, or such a list as JSON text.
        tools: a list of function descriptions, or such a list as JSON text.
        system: a system message that stands outside of the list.
        answered: the assistant must have an answer to learn.
    """
    try:
        turns = _turns(messages, system)
        described = _tools(tools)
    except _UnreadableError as unreadable:
        return unreadable.problem
    learned = _learned(turns)
    if answered and not learned:
        mute = all(turn["role"] != "assistant" for turn in turns)
        return Problem("no assistant turn" if mute else "no assistant turn to learn", skip=True)
    shown = tuple({key: value for key, value in turn.items() if key != "weight"} for turn in turns)
    return Conversation(shown, described, learned)


def conversation(messages: object, tools: object = None, answered: bool = True) -> Conversation:
    """Read a conversation.

    Raises:
        DataError: it is none.
    """
    found = read_conversation(messages, tools, answered=answered)
    if isinstance(found, Problem):
        raise DataError(f"{found.text}.")
    return found


def message_problem(messages: object, answered: bool = True) -> str | None:
    """Return what is wrong with a conversation, or None; ``answered``: the assistant must have a turn."""
    found = read_conversation(messages, answered=answered)
    return found.text if isinstance(found, Problem) else None


def _turns(messages: object, system: object) -> list[Message]:
    items = _listed(messages, "'messages' must be a list of {role, content}")
    if not items:
        raise _UnreadableError("no messages", skip=True)
    turns = [_turn(number, message) for number, message in enumerate(items, start=1)]
    for number, turn in enumerate(turns, start=1):
        before = turns[number - 2]["role"] if number > 1 else None
        if turn["role"] == "tool" and before not in ("assistant", "tool"):
            follows = f"one by '{before}'" if before else "nothing"
            raise _UnreadableError(f"message {number} (tool) follows {follows}")
    if isinstance(system, str) and system.strip():
        if turns[0]["role"] in ("system", "developer") and turns[0]["content"].strip() != system.strip():
            raise _UnreadableError("both a system message and another text in the system column")
        if turns[0]["role"] not in ("system", "developer"):
            turns.insert(0, {"role": "system", "content": system})
    return turns


def _turn(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise _UnreadableError(f"message {number} is not an object with 'role' and 'content'")
    given = message.get("role") if message.get("role") is not None else message.get("from")
    role = _ROLE_NAMES.get(str(given).strip().lower())
    if role is None:
        near = did_you_mean(str(given).lower(), list(_ROLE_NAMES)).rstrip(".")
        raise _UnreadableError(
            f"message {number} has the role '{given}'; known are {quoted(ROLES)}, and ShareGPT's names.{near}"
        )
    content = message.get("content") if message.get("content") is not None else message.get("value")
    calls = _calls(number, message, content if given == "function_call" else None)
    text = "" if given == "function_call" else _text(number, role, content)
    if not text.strip() and not calls:
        raise _UnreadableError(f"message {number} ({role}) has no text", skip=True)
    broken = text_problem(text)
    if broken:
        raise _UnreadableError(f"message {number} ({role}) {broken}")
    turn: Message = {"role": role, "content": text}
    if calls:
        turn["tool_calls"] = calls
    turn.update({key: message[key] for key in _KEPT if message.get(key) is not None})
    if message.get("weight") == 0 or message.get("train") is False:
        turn["weight"] = 0
    return turn


def _text(number: int, role: str, content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise _UnreadableError(f"message {number} ({role}) has {type(content).__name__} as its content, not a text")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text", None) or not isinstance(text, str):
            raise _UnreadableError(f"message {number} ({role}) has a part of type '{kind}'; only text can be read")
        parts.append(text)
    return "".join(parts)


def _calls(number: int, message: Mapping[str, Any], sharegpt: object) -> list[dict[str, Any]]:
    """Return the tool calls of a message as ``{"type": "function", "function": {"name", "arguments"}}``."""
    given: Any = message.get("tool_calls") or []
    if message.get("function_call"):
        given = [message["function_call"]]  # OpenAI's older name for a single call
    if sharegpt is not None:
        given = sharegpt
    what = f"message {number} (assistant) calls no tool: {{name, arguments}} is needed"
    if isinstance(given, str) and not given.strip():
        return []
    if isinstance(given, str):
        given = _parsed(given, what)
    calls = []
    for call in [given] if isinstance(given, Mapping) else given:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise _UnreadableError(what)
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"message {number} (assistant): the call's arguments are not JSON")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**known, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _tools(tools: object) -> tuple[dict[str, Any], ...] | None:
    if tools is None or tools == "":
        return None
    what = "'tools' must be a list of function descriptions"
    described = []
    for tool in _listed(tools, what):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise _UnreadableError(f"{what}, each with a 'name'")
        described.append({"type": "function", "function": dict(inner)})
    return tuple(described) or None


def _listed(value: object, what: str) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _parsed(value, what)
    if not isinstance(value, (list, tuple)):
        raise _UnreadableError(what)
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _UnreadableError(f"{what}: {error.msg} at character {error.pos + 1}") from error


def _learned(turns: Sequence[Message]) -> tuple[int, ...]:
    asked = False
    learned = []
    for index, turn in enumerate(turns):
        asked = asked or turn["role"] in ("user", "tool")
        if turn["role"] == "assistant" and asked and turn.get("weight") != 0:
            learned.append(index)
    return tuple(learned)
