"""Text to token ids with a mark on every token that the model is to learn to write.

A whole text is tokenised once and each token is marked by the characters it covers, so that tokens which
join two words, or the last character of a prompt to the first of an answer, are never guessed at. Where
generation will start from a prompt that is tokenised alone, the training tokens start with exactly those ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]
Marked = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Passage:
    """A text, and which of its characters the model is to learn to write.

    Attributes:
        text: all of it, in the order the model reads it.
        spans: supervised characters as ``(start, end)``, in order.
        prompt_end: generation will be asked to go on from ``text[:prompt_end]``; None for several turns.
        special: begin with what the tokenizer puts before a single sequence (BOS), as ``text`` has none.
        end: close with the end-of-sequence token, supervised.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    prompt_end: int | None = None
    special: bool = False
    end: bool = False


def encode_passages(tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]) -> list[Marked]:
    """Tokenise passages in one batch.

    Returns:
        For each passage its token ids, and for each id whether it is supervised.

    Raises:
        ModelError: the tokenizer cannot tell which characters a token covers, or has no end of sequence.
    """
    if not passages:
        return []
    all_ids, all_offsets = _batch(tokenizer, [passage.text for passage in passages])
    cut = [index for index, passage in enumerate(passages) if passage.prompt_end is not None]
    prompts, prompt_offsets = _batch(tokenizer, [passages[i].text[: passages[i].prompt_end] for i in cut])
    for index, prompt, offsets in zip(cut, prompts, prompt_offsets, strict=True):
        if all_ids[index][: len(prompt)] != prompt:
            rest, rest_offsets = _continuation(tokenizer, passages[index])
            all_ids[index], all_offsets[index] = prompt + rest, offsets + rest_offsets
    before = special_prefix(tokenizer) if any(passage.special for passage in passages) else []
    end = end_of_sequence(tokenizer) if any(passage.end for passage in passages) else -1
    marked = []
    for passage, ids, offsets in zip(passages, all_ids, all_offsets, strict=True):
        mask = _mask(offsets, passage.spans)
        head = before if passage.special else []
        tail = [end] if passage.end and ids[-1:] != [end] else []
        marked.append((head + ids + tail, [False] * len(head) + mask + [True] * len(tail)))
    return marked


def text_problem(text: str) -> str | None:
    """Return why a text cannot be tokenised (half of a surrogate pair, as a cut JSON escape leaves), or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair at character {error.start + 1}"
    return None


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a single sequence: ``[bos]``, ``[cls]`` or none."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-sequence token.

    Raises:
        ModelError: there is none, so that a model could not learn where to stop.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no end-of-sequence token, so that a model "
            "cannot learn where to stop. Set 'eos_token' in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def _batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[list[int]], list[Offsets]]:
    if not texts:
        return [], []
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' cannot tell which characters a token covers. "
            "Use a model with a tokenizer.json."
        )
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _continuation(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> tuple[list[int], Offsets]:
    """Tokenise what follows the prompt on its own.

    It is tokenised behind a line break whose tokens are then dropped, because some tokenizers put a space
    before the start of any text.
    """
    assert passage.prompt_end is not None
    start = passage.prompt_end
    (mark, joined, rest), (_, joined_offsets, rest_offsets) = _batch(
        tokenizer, ["\n", "\n" + passage.text[start:], passage.text[start:]]
    )
    if joined[: len(mark)] == mark:
        shifted = [(first + start - 1, last + start - 1) for first, last in joined_offsets[len(mark) :]]
        return joined[len(mark) :], shifted
    return rest, [(first + start, last + start) for first, last in rest_offsets]


def _mask(offsets: Offsets, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Mark the tokens that cover a supervised character; one that covers none is marked by its place."""
    mask = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for index, (first, last) in enumerate(offsets):
        while span is not None and span[1] <= first:
            span = next(remaining, None)
        if span is None:
            break
        mask[index] = max(last, first + 1) > span[0]
    return mask
