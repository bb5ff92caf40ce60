"""Conversations as tokens, with the assistant's words marked, for any chat template.

Templates rarely say which characters are the assistant's. Each turn is found by comparing renderings: the
conversation before it (with the generation prompt), through it, and whole. The supervised part begins
behind the generation prompt and ends with the turn's end mark; white space behind that mark is not
supervised. Where renderings do not continue each other (a template that writes earlier answers in
another way than the last), the answer is replaced by a mark to see where it stands.

A tokenizer without a template gets a plain one:

    ### System:                     only if there is a system message
    {content}

    ### User:
    {content}

    ### Assistant:
    {content}{end-of-sequence token}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, quoted
from lorakit.text.tokens import Passage, encode_passages, end_of_sequence, text_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
_FOLLOWS = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_MARK = "⟦1⟧⟦0⟧⟦1⟧"  # no letters, no spaces: filters of a template leave it as it is


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer brings a chat template of its own."""
    return bool(tokenizer.chat_template)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: a fast tokenizer; without a template the plain one above is used.
        messages: ``{"role": ..., "content": ...}`` in order, at least one by the assistant.

    Returns:
        The token ids, and for each whether the assistant writes it (end-of-turn token included).

    Raises:
        DataError: the messages do not make a conversation, or the template hides where a turn stands.
    """
    return encode_passages(tokenizer, [chat_passage(tokenizer, messages)])[0]


def message_problem(messages: object, answered: bool = True) -> str | None:
    """Return what is wrong with a conversation, or None; ``answered``: the assistant must have a turn."""
    if not isinstance(messages, (list, tuple)) or not messages:
        return "'messages' must be a list of {role, content}"
    previous: str | None = None
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            return f"message {number} is not an object with 'role' and 'content'"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"message {number} has the role '{role}'; known are {quoted(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            return f"message {number} ({role}) has no text in 'content'"
        broken = text_problem(content)
        if broken:
            return f"message {number} ({role}) {broken}"
        if previous not in _FOLLOWS[role]:
            return f"message {number} ({role}) follows " + (f"one by '{previous}'" if previous else "nothing")
        previous = role
    if answered and all(message["role"] != "assistant" for message in messages):
        return "no message is the assistant's"
    return None


def chat_passage(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Passage:
    """Render a conversation, with the assistant's turns as supervised characters.

    Raises:
        DataError: as ``chat_tokens``.
    """
    problem = message_problem(messages)
    if problem:
        raise DataError(f"{problem}.")
    turns = _role_and_content(messages)
    if not has_chat_template(tokenizer):
        end_of_sequence(tokenizer)
        return _plain_passage(turns, str(tokenizer.eos_token))
    full = _render(tokenizer, turns)
    spans = [_span(tokenizer, turns, index, full) for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    return Passage(full, tuple(spans))


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Passage:
    """Render a conversation up to where the assistant's next words begin, as training rendered it.

    What a template adds for generation only (an opened thought) and never writes in a finished
    conversation is left off: the adapter has not seen it.

    Raises:
        DataError: the messages do not make a conversation, or the template refuses them.
    """
    problem = message_problem(messages, answered=False)
    if problem:
        raise DataError(f"{problem}.")
    turns = _role_and_content(messages)
    if not has_chat_template(tokenizer):
        return Passage(_plain_text(turns, tokenizer.eos_token or "") + "### Assistant:\n", special=True)
    asked = _render(tokenizer, turns, for_answer=True)
    answered = _render(tokenizer, [*turns, {"role": "assistant", "content": _MARK}])
    return Passage(asked[: _common(asked, answered.partition(_MARK)[0])])


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which a chat answer is over: end of sequence, and the template's end of turn."""
    ends = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if has_chat_template(tokenizer):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        tail = _render(tokenizer, turns).partition(_MARK)[2].strip()
        first = tokenizer(tail, add_special_tokens=False).input_ids[:1]
        added = set(tokenizer.added_tokens_decoder)
        ends += [token for token in first if token in added and token not in ends]
    return ends


def _role_and_content(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _plain_text(turns: Sequence[Mapping[str, str]], end: str) -> str:
    parts = []
    for turn in turns:
        closing = end if turn["role"] == "assistant" else ""
        parts.append(f"### {turn['role'].capitalize()}:\n{turn['content']}{closing}\n\n")
    return "".join(parts)


def _plain_passage(turns: Sequence[Mapping[str, str]], end: str) -> Passage:
    text = _plain_text(turns, end)
    spans = []
    position = 0
    for turn in turns:
        start = position + len(f"### {turn['role'].capitalize()}:\n")
        position += len(_plain_text([turn], end))
        if turn["role"] == "assistant":
            spans.append((start, position - len("\n\n")))
    return Passage(text.removesuffix("\n\n"), tuple(spans), special=True)


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], for_answer: bool = False) -> str:
    import jinja2

    messages = [dict(turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer))
    except jinja2.TemplateError as error:
        raise DataError(
            f"the model's chat template refuses messages 1 to {len(turns)}: {error}. Change their roles."
        ) from error


def _span(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], index: int, full: str
) -> tuple[int, int]:
    """Return the supervised characters of the assistant's turn ``index`` in the whole rendering."""
    try:
        found = _compared(tokenizer, turns, index, full) or _marked(tokenizer, turns, index, full)
    except DataError as error:
        raise DataError(f"message {index + 1} (assistant) cannot be told apart: {error}") from error
    start, content_end, end = found
    kept = start + len(full[start:end].rstrip())
    # White space behind the end mark is not the assistant's; where nothing else follows, it is the mark.
    return start, kept if kept > content_end else end


def _compared(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], index: int, full: str
) -> tuple[int, int, int] | None:
    """Find a turn as what the rendering through it adds: its start, its content's end, its end."""
    before = _render(tokenizer, turns[:index], for_answer=True)
    through = full if index == len(turns) - 1 else _render(tokenizer, turns[: index + 1])
    start, end = _common(before, through), _common(through, full)
    content = turns[index]["content"].strip()
    place = full.rfind(content, start, end) if start < end else -1
    return None if place < 0 else (start, place + len(content), end)


def _marked(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], index: int, full: str
) -> tuple[int, int, int]:
    """Find a turn by a mark in its place: its content's start and end, and the turn's end."""
    marked_turns = [dict(turn) for turn in turns]
    marked_turns[index]["content"] = _MARK
    prefix, _, suffix = _render(tokenizer, marked_turns).partition(_MARK)
    closing = _render(tokenizer, marked_turns[: index + 1]).partition(_MARK)[2]
    start, end = len(prefix), len(full) - len(suffix)
    content = full[start:end].strip()
    if not full.startswith(prefix) or not full.endswith(suffix) or not content:
        raise DataError("the model's chat template leaves it out or rewrites what stands around it.")
    if content not in turns[index]["content"]:
        raise DataError("the model's chat template rewrites it.")
    return start, end - (len(full[start:end]) - len(full[start:end].rstrip())), end + _common(closing, suffix)


def _common(one: str, other: str) -> int:
    """Return how many first characters two texts share."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
