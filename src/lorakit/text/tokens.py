"""Text to token ids with a mark on every token that the model is to learn to write.

A whole text is tokenised once and each token is marked by the characters it covers, so that tokens which
join two words, or the last character of a prompt to the first of an answer, are never guessed at. Where
generation will start from a prompt that is tokenised alone, the training tokens start with exactly those ids.
"""

from __future__ import annotations

import itertools
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
        cuts: where generation starts from ``text[:cut]``, in order: the tokens before each are those of that prompt.
        special: begin with what the tokenizer puts before a single sequence (BOS), as ``text`` has none.
        end: close with the end-of-sequence token, supervised.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    cuts: tuple[int, ...] = ()
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
    bodies: list[Marked | None] = [None] * len(passages)
    simple = [i for i, passage in enumerate(passages) if _is_prompt_and_rest(passage)]
    for index, body in zip(simple, _prompts_and_rests(tokenizer, [passages[i] for i in simple]), strict=True):
        bodies[index] = body
    others = [i for i, body in enumerate(bodies) if body is None]
    for index, body in zip(others, _by_characters(tokenizer, [passages[i] for i in others]), strict=True):
        bodies[index] = body
    before = special_prefix(tokenizer) if any(passage.special for passage in passages) else []
    end = end_of_sequence(tokenizer) if any(passage.end for passage in passages) else -1
    marked = []
    for passage, done in zip(passages, bodies, strict=True):
        assert done is not None
        ids, mask = done
        head = before if passage.special else []
        tail = [end] if passage.end and ids[-1:] != [end] else []
        marked.append((head + ids + tail, [False] * len(head) + mask + [True] * len(tail)))
    return marked


def _is_prompt_and_rest(passage: Passage) -> bool:
    """Tell whether all behind one prompt is supervised, so that its tokens need only be counted."""
    return len(passage.cuts) == 1 and passage.spans == ((passage.cuts[0], len(passage.text)),)


def _prompts_and_rests(tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]) -> list[Marked | None]:
    """Tokenise without asking which characters tokens cover; None where whole and prompt do not fit together."""
    wholes = _ids(tokenizer, [passage.text for passage in passages])
    prompts = _ids(tokenizer, [passage.text[: passage.cuts[0]] for passage in passages])
    return [
        (whole, [False] * len(prompt) + [True] * (len(whole) - len(prompt))) if whole[: len(prompt)] == prompt else None
        for whole, prompt in zip(wholes, prompts, strict=True)
    ]


def _by_characters(tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]) -> list[Marked]:
    all_ids, all_offsets = _batch(tokenizer, [passage.text for passage in passages])
    places = [(index, cut) for index, passage in enumerate(passages) for cut in passage.cuts]
    prompts = _ids(tokenizer, [passages[index].text[:cut] for index, cut in places])
    apart = {index for (index, _), ids in zip(places, prompts, strict=True) if all_ids[index][: len(ids)] != ids}
    for index in apart:
        all_ids[index], all_offsets[index] = _cut_where_needed(tokenizer, passages[index])
    return [
        (ids, _mask(offsets, passage.spans))
        for passage, ids, offsets in zip(passages, all_ids, all_offsets, strict=True)
    ]


def _cut_where_needed(tokenizer: PreTrainedTokenizerBase, passage: Passage) -> tuple[list[int], Offsets]:
    """Tokenise in pieces at those cuts before which the whole has other tokens than the prompt, from the first on.

    What is decided for a cut depends on what stands before it, so that a prompt with earlier turns is cut alike.
    """
    needed: list[int] = []
    whole = _pieces(tokenizer, passage.text, needed)
    for cut in passage.cuts:
        prompt, _ = _pieces(tokenizer, passage.text[:cut], needed)
        if whole[0][: len(prompt)] != prompt:
            needed.append(cut)
            whole = _pieces(tokenizer, passage.text, needed)
    return whole


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


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


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


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int]) -> tuple[list[int], Offsets]:
    """Tokenise the text in pieces that end at the cuts.

    Each later piece is tokenised behind a line break whose tokens are then dropped, because some tokenizers put
    a space before the start of any text.
    """
    edges = [0, *cuts, len(text)]
    texts = [text[start:end] for start, end in itertools.pairwise(edges)]
    plain, plain_offsets = _batch(tokenizer, texts)
    (mark, *joined), (_, *joined_offsets) = _batch(tokenizer, ["\n", *("\n" + piece for piece in texts[1:])])
    ids, offsets = plain[0], plain_offsets[0]
    for index, start in enumerate(cuts, start=1):
        behind, places, moved = joined[index - 1], joined_offsets[index - 1], start - 1
        if behind[: len(mark)] == mark:
            behind, places = behind[len(mark) :], places[len(mark) :]
        else:
            behind, places, moved = plain[index], plain_offsets[index], start
        ids = ids + behind
        offsets = offsets + [(first + moved, last + moved) for first, last in places]
    return ids, offsets


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
