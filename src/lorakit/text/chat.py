"""Conversations as tokens, with the assistant's words marked, for any chat template.

Templates rarely say which characters are the assistant's. Each turn is found by comparing renderings: the
conversation before it (with the generation prompt) and the conversation through it. What the second adds to
the first is the turn, up to its end mark; white space behind that mark is not supervised. Where a template
has ``{% generation %}`` marks, they say it instead.

Some templates write an earlier answer otherwise than they wrote it when it was the last one (they take the
thought out of it). Its tokens in the whole conversation are then not those that the model would have written,
so they are masked there, and the answer is learned from a passage of its own that ends with it.

A tokenizer without a template gets a plain one:

    ### System:                     only if there is a system message
    {content}

    ### User:
    {content}

    ### Assistant:
    {content}{end-of-sequence token}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError
from lorakit.text.messages import Conversation, Message, Messages, conversation, message_problem
from lorakit.text.template import (
    Span,
    common,
    has_chat_template,
    marked_spans,
    placed_system,
    render,
    template_facts,
)
from lorakit.text.tokens import Passage, encode_passages, end_of_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Messages",
    "chat_passage",
    "chat_passages",
    "chat_prompt",
    "chat_tokens",
    "end_of_turn_ids",
    "has_chat_template",
    "message_problem",
]

Tools = Sequence[Mapping[str, Any]] | None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """Tokenise a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: a fast tokenizer; without a template the plain one above is used.
        messages: ``{"role": ..., "content": ...}`` in order, at least one by the assistant.
        tools: function descriptions that the model is told of.

    Returns:
        The token ids, and for each whether it is supervised: the assistant's, end-of-turn token included.
        An answer that the template writes otherwise once others follow is masked here; ``chat_passages`` has it.

    Raises:
        DataError: the messages do not make a conversation, or the template hides where a turn stands.
    """
    return encode_passages(tokenizer, [chat_passage(tokenizer, messages, tools)])[0]


def chat_passage(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> Passage:
    """Render a whole conversation, with those of the assistant's turns supervised that it writes as when given.

    Raises:
        DataError: as ``chat_tokens``.
    """
    return chat_passages(tokenizer, conversation(messages, tools))[-1]


def chat_passages(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> list[Passage]:
    """Render a conversation so that every learned answer is supervised once, as the model is to write it.

    Returns:
        The whole conversation last, before it one passage for each answer that the template later rewrites.
        The whole one is left out if nothing in it is supervised.

    Raises:
        DataError: as ``chat_tokens``.
    """
    if not has_chat_template(tokenizer):
        end_of_sequence(tokenizer)
    turns, moved = placed_system(tokenizer, talk)
    shift = len(talk.messages) - len(turns) if moved else 0
    learned = {index - shift for index in talk.learned}
    full = render(tokenizer, turns, talk.tools)
    alone: list[Passage] = []
    spans: list[Span] = []
    cuts: list[int] = []
    for index in _answers(turns):
        text = full if index == len(turns) - 1 else render(tokenizer, turns[: index + 1], talk.tools)
        try:
            start, end = _span(tokenizer, turns[: index + 1], talk.tools, text)
        except DataError as error:
            if index not in learned:
                continue
            raise DataError(f"message {index + shift + 1} (assistant) cannot be learned: {error}") from error
        if full[:end] == text[:end]:
            cuts.append(start)
            spans += [(start, end)] if index in learned else []
        elif index in learned:
            before = [cut for cut in cuts if cut < start and full[:cut] == text[:cut]]
            alone.append(_passage(tokenizer, text, [(start, end)], [*before, start]))
    _check_whole(turns, talk.tools, full)
    whole = [_passage(tokenizer, full, spans, cuts)] if spans or not alone else []
    return [*alone, *whole]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> Passage:
    """Render a conversation up to where the assistant's next words begin, as training rendered it.

    What a template adds for generation only (an opened thought) and never writes in a finished
    conversation is left off: the adapter has not seen it.

    Raises:
        DataError: the messages do not make a conversation, or the template refuses them.
    """
    talk = conversation(messages, tools, answered=False)
    turns, _ = placed_system(tokenizer, talk)
    text = render(tokenizer, turns, talk.tools, for_answer=True)
    cuts = []
    for index in _answers(turns):
        through = render(tokenizer, turns[: index + 1], talk.tools)
        try:
            start, end = _span(tokenizer, turns[: index + 1], talk.tools, through)
        except DataError:
            continue  # an answer that could not be learned is no reason not to go on from it
        cuts += [start] if text[:end] == through[:end] else []
    return Passage(text, special=not has_chat_template(tokenizer), cuts=tuple(cuts))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens at which a chat answer is over: end of sequence, and the template's end of turn."""
    ends = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    if has_chat_template(tokenizer):
        first = tokenizer(template_facts(tokenizer).closing, add_special_tokens=False).input_ids[:1]
        added = set(tokenizer.added_tokens_decoder)
        ends += [token for token in first if token in added and token not in ends]
    return ends


def _answers(turns: Sequence[Message]) -> list[int]:
    """Return the numbers of the assistant's turns that answer something."""
    asked = next((i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")), len(turns))
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > asked]


def _passage(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], cuts: Sequence[int]) -> Passage:
    plain = not has_chat_template(tokenizer)
    text = text.removesuffix("\n\n") if plain else text
    return Passage(text, tuple(spans), special=plain, cuts=tuple(cuts))


def _span(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: Tools, text: str) -> Span:
    """Return the supervised characters of the last of ``turns`` in its rendering ``text``."""
    before = render(tokenizer, turns[:-1], tools, for_answer=True)
    if not text.startswith(before):
        shared = common(before, text)
        raise DataError(
            "once it is given, the model's chat template writes what stands before it in another way: "
            f"'{_excerpt(before[shared:])}' becomes '{_excerpt(text[shared:])}'. Use a model with another template."
        )
    start = len(before)
    _check_answer(turns[-1], text[start:])
    marked = marked_spans(tokenizer, turns, tools, text)
    if marked and len(marked) == sum(turn["role"] == "assistant" for turn in turns) and marked[-1][1] > start:
        return max(marked[-1][0], start), marked[-1][1]
    footer = template_facts(tokenizer, bool(tools)).footer if has_chat_template(tokenizer) else ""
    text = text.removesuffix(footer)
    kept = text[start:].rstrip()
    # White space behind the end mark is not the assistant's; where nothing else follows, it is the mark.
    ends_with_words = bool(turns[-1]["content"].strip()) and kept.endswith(turns[-1]["content"].rstrip())
    return start, len(text) if ends_with_words else start + len(kept)


def _check_answer(turn: Message, written: str) -> None:
    """Refuse an answer of which the template leaves out or rewrites something: it could not be learned."""
    squeezed = _squeezed(written)
    for word in [call["function"]["name"] for call in turn.get("tool_calls", ())]:
        if word not in written:
            raise DataError(
                f"the model's chat template does not write its call of '{word}'. Put the call into 'content' as text, "
                "or use a model whose template knows tool calls."
            )
    content = _squeezed(turn["content"])
    thought = _squeezed(str(turn.get("reasoning_content") or turn.get("thinking") or ""))
    if content not in squeezed and not _in_order(content, squeezed):
        raise DataError(
            f"the model's chat template leaves out or rewrites a part of '{_excerpt(turn['content'])}'. If it takes "
            "thoughts out, remove them from the rows, or use a model whose template keeps them in the last answer."
        )
    if thought not in squeezed:
        raise DataError(
            "the model's chat template leaves out its 'reasoning_content'. Remove that field, or use a model whose "
            "template writes it."
        )


def _in_order(content: str, written: str) -> bool:
    """Tell whether a thought and the answer behind it are both written, with other white space or marks between."""
    thought, mark, answer = content.partition("</think>")
    place = written.find(thought.removeprefix("<think>"))
    return bool(mark) and place >= 0 and written.find(answer, place + len(thought.removeprefix("<think>"))) >= 0


def _check_whole(turns: Sequence[Message], tools: Tools, full: str) -> None:
    """Refuse a conversation of which the template leaves out what the model is to read."""
    squeezed = _squeezed(full)
    for number, turn in enumerate(turns, start=1):
        escaped = json.dumps(turn["content"], ensure_ascii=False)[1:-1]
        told = turn["role"] != "assistant"
        if told and _squeezed(turn["content"]) not in squeezed and _squeezed(escaped) not in squeezed:
            raise DataError(f"the model's chat template leaves out message {number} ({turn['role']}). Remove it.")
    missing = [tool["function"]["name"] for tool in tools or () if tool["function"]["name"] not in full]
    if missing:
        raise DataError(
            f"the model's chat template does not tell the model of its tools (such as '{missing[0]}'). Leave the "
            "tools out, or use a model whose template knows them."
        )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _excerpt(text: str, width: int = 40) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= width else shown[: width - 1] + "…"
