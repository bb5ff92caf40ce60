"""A model's own chat template: rendering it, and what it does that rows cannot show.

Facts about a template are found by rendering short conversations, never by reading its source:

    system     does it write a system message? If not (it refuses or drops it), the text is put at the start
               of the first user's message, in training, in chat and in serving alike.
    opening    what it writes between a question and an answer. What it adds for generation only, and never
               in a finished conversation (an opened thought), is left off: the adapter will not have seen it.
               Where it has no generation prompt, the answer's heading is taken from a finished conversation.
    closing    what it writes behind an answer: nothing means that a model cannot learn to stop. What it writes only
               behind the last answer, after a mark that ends each, closes the conversation and is not the answer's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.text.messages import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_MARK = "⟦1⟧⟦0⟧⟦1⟧"  # no letters, no spaces: filters of a template leave it as it is
_BEGIN, _END = "\ue000", "\ue001"  # private characters: no text of a row or template has a use for them
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_PLAIN = "plain"


@dataclass(frozen=True)
class TemplateFacts:
    """What a template does, as found by rendering.

    Attributes:
        writes_system: it has a place for a system message.
        dropped: how many last characters of its generation prompt never occur in a finished conversation.
        header: what stands between question and answer where it has no generation prompt.
        closing: what it writes behind an answer, without white space around it.
        footer: what it writes behind the last answer in addition.
        marks_answers: it has ``{% generation %}`` marks.
    """

    writes_system: bool
    dropped: int
    header: str
    closing: str
    footer: str
    marks_answers: bool


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer brings a chat template of its own."""
    return bool(tokenizer.chat_template)


def template_facts(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> TemplateFacts:
    """Find out what a tokenizer's chat template does.

    Raises:
        DataError: it refuses a question with an answer.
    """
    special = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return _found(_Template(tokenizer, _source(tokenizer, tools), special))


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    for_answer: bool = False,
) -> str:
    """Write turns as the template does, or as the plain one where there is none.

    Args:
        tokenizer: with its template.
        turns: messages; a system message is one that the template writes.
        tools: function descriptions.
        for_answer: end where the assistant's next words begin, as training rendered it.

    Raises:
        DataError: the template refuses the turns.
    """
    if not has_chat_template(tokenizer):
        return plain_text(turns, tools, tokenizer.eos_token or "") + ("### Assistant:\n" if for_answer else "")
    text = _rendered(tokenizer, _source(tokenizer, bool(tools)), turns, tools, for_answer)
    if not for_answer:
        return text
    facts = template_facts(tokenizer, bool(tools))
    return text[: len(text) - facts.dropped] + facts.header


def placed_system(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> tuple[list[Message], bool]:
    """Return the turns with the system message where the template has a place for it, and whether it moved."""
    turns = [dict(turn) for turn in talk.messages]
    source = _source(tokenizer, bool(talk.tools)) if has_chat_template(tokenizer) else _PLAIN
    for turn in turns:
        if turn["role"] == "developer" and "developer" not in source:
            turn["role"] = "system"
    if turns[0]["role"] != "system" or source == _PLAIN or template_facts(tokenizer, bool(talk.tools)).writes_system:
        return turns, False
    user = next((turn for turn in turns if turn["role"] == "user"), None)
    if user is None:
        raise DataError("the model's chat template has no place for a system message, and no user's message follows.")
    user["content"] = f"{turns[0]['content'].strip()}\n\n{user['content']}"
    return turns[1:], True


def moves_system(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> bool:
    """Tell whether a conversation has a system message for which the template has no place."""
    first = talk.messages[0]["role"] in ("system", "developer")
    return first and has_chat_template(tokenizer) and not template_facts(tokenizer, bool(talk.tools)).writes_system


def never_ends_a_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether nothing stands behind an answer, so that a model cannot learn to stop."""
    return has_chat_template(tokenizer) and not template_facts(tokenizer).closing


def marked_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, text: str
) -> list[Span]:
    """Return the stretches of a rendering that the template puts between ``{% generation %}`` marks."""
    if not has_chat_template(tokenizer) or not template_facts(tokenizer, bool(tools)).marks_answers:
        return []
    source = _source(tokenizer, bool(tools))
    marked = _rendered(tokenizer, _GENERATION.sub(_visible, source), turns, tools, False)
    if marked.replace(_BEGIN, "").replace(_END, "") != text:
        return []
    spans: list[Span] = []
    position, start = 0, 0
    for piece in re.split(f"([{_BEGIN}{_END}])", marked):
        if piece == _BEGIN:
            start = position
        elif piece == _END:
            spans.append((start, position))
        else:
            position += len(piece)
    return spans


def plain_text(turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, end: str) -> str:
    """Write turns in the plain template."""
    parts = []
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        parts.append(f"### Tools:\n{listed}\n\n")
    for turn in turns:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
        said = "\n".join([*([turn["content"]] if turn["content"] else []), *calls])
        closing = end if turn["role"] == "assistant" else ""
        role = "system" if turn["role"] == "developer" else turn["role"]
        parts.append(f"### {role.capitalize()}:\n{said}{closing}\n\n")
    return "".join(parts)


class _Template:
    """A template as a key: equal to another that renders the same; carries the tokenizer that renders it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, special: tuple[tuple[str, str], ...]) -> None:
        self.tokenizer, self.source, self._key = tokenizer, source, (source, special)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self._key == other._key

    def render(self, turns: Sequence[Message], for_answer: bool = False) -> str:
        return _rendered(self.tokenizer, self.source, turns, None, for_answer)


@lru_cache(maxsize=8)
def _found(template: _Template) -> TemplateFacts:
    asking: Message = {"role": "user", "content": "?"}
    answering: Message = {"role": "assistant", "content": _MARK}
    asked, silent = template.render([asking], for_answer=True), template.render([asking])
    before, mark, behind = template.render([asking, answering]).partition(_MARK)
    if not mark:
        raise DataError("the model's chat template leaves out what the assistant says.")
    shared = common(asked, before)
    ending = _shared_ending(template, [asking, answering], behind)
    header = before[len(asked) :].rstrip(" ") if asked == silent and shared == len(asked) else ""
    return TemplateFacts(
        writes_system=_writes_system(template, asking, answering),
        dropped=len(asked) - shared,
        header=header if header.strip() else "",
        closing=behind[:ending].strip(),
        footer=behind[ending:],
        marks_answers=_GENERATION.search(template.source) is not None,
    )


def _shared_ending(template: _Template, turns: Sequence[Message], behind: str) -> int:
    """Return how much of what stands behind the last answer stands behind an earlier one too, in whole tokens."""
    try:
        earlier = template.render([*turns, *turns]).partition(_MARK)[2]
    except DataError:
        return len(behind)
    shared = common(behind, earlier)
    if shared == len(behind) or not template.tokenizer.is_fast:
        return len(behind)
    encoded = template.tokenizer(behind, add_special_tokens=False, return_offsets_mapping=True)
    edges = [end for _, end in encoded["offset_mapping"] if end <= shared]
    ending = max(edges, default=0)
    return ending if behind[:ending].strip() else len(behind)


def _writes_system(template: _Template, asking: Message, answering: Message) -> bool:
    """Tell whether a system message is written before the question, also once there is an answer."""
    system: Message = {"role": "system", "content": "⟦2⟧"}
    try:
        finished = template.render([system, asking, answering])
    except DataError:
        return False
    return "⟦2⟧" in finished.partition(_MARK)[0]


def _source(tokenizer: PreTrainedTokenizerBase, tools: bool) -> str:
    """Return the template's text; some tokenizers have several, one of them for tools."""
    return str(tokenizer.get_chat_template(tools=[{}] if tools else None))


def _visible(mark: re.Match[str]) -> str:
    # A block on either side, so that white space around the mark is cut as around the original.
    letter = _END if mark[2] else _BEGIN
    return f"{{%{mark[1]} if true %}}{{{{ '{letter}' }}}}{{% endif {mark[3]}%}}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    turns: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    for_answer: bool,
) -> str:
    import jinja2

    messages = [dict(turn) for turn in turns]
    described = [dict(tool) for tool in tools] if tools else None
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=described,  # type: ignore[arg-type]
                chat_template=source,
                tokenize=False,
                add_generation_prompt=for_answer,
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the model's chat template refuses messages 1 to {len(turns)}: {error}") from error


def common(one: str, other: str) -> int:
    """Return how many first characters two texts share."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
