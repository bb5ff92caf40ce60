"""The tokens of a row as text to look at: each piece as it is written, and whether it is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.training.data.encoded import IGNORED, EncodedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPERVISED, MASKED, CUT = "supervised", "masked", "cut"
_PARTIAL = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """One token, or the several that make up one character.

    Attributes:
        text: as the tokens are written; all pieces in order are the row's text.
        ids: the tokens.
        kind: 'supervised', 'masked' (read, not learned) or 'cut' (behind the last token that is kept).
        special: a mark such as the end of a turn.
    """

    text: str
    ids: tuple[int, ...]
    kind: str
    special: bool


def pieces_of(tokenizer: PreTrainedTokenizerBase, trained: EncodedRow | None, whole: EncodedRow) -> tuple[Piece, ...]:
    """Return a row in its pieces; of an encoder-decoder's row the tokens read, then those to write.

    Args:
        tokenizer: the model's.
        trained: the row as it is trained on; None if it is left out.
        whole: the row without a limit to its length.
    """
    if trained is None:
        return tuple(_pieces(tokenizer, whole.input_ids, [CUT] * len(whole.input_ids)))
    ids, labels = trained.input_ids, trained.labels
    if not isinstance(labels, list):
        return (*_pieces(tokenizer, ids, [MASKED] * len(ids)), *_cut_off(tokenizer, trained, whole))
    pairs = zip(labels, ids, strict=False)
    if len(labels) == len(ids) and all(label in (IGNORED, token) for label, token in pairs):
        kinds = [MASKED if label == IGNORED else SUPERVISED for label in labels]
        return tuple(_pieces(tokenizer, ids, kinds))
    read = _pieces(tokenizer, ids, [MASKED] * len(ids))
    return (*read, *_pieces(tokenizer, labels, [SUPERVISED] * len(labels)))


def _cut_off(tokenizer: PreTrainedTokenizerBase, trained: EncodedRow, whole: EncodedRow) -> list[Piece]:
    """Return what was cut between the last kept token and the marks at the end; of pairs it is not shown."""
    if len(whole.input_ids) <= len(trained.input_ids) or trained.token_type_ids is not None:
        return []
    pairs = zip(trained.input_ids, whole.input_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(trained.input_ids))
    cut = whole.input_ids[same : len(whole.input_ids) - (len(trained.input_ids) - same)]
    return _pieces(tokenizer, cut, [CUT] * len(cut))


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kinds: Sequence[str]) -> list[Piece]:
    marks = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(ids) + 1):
        group = list(ids[start:end])
        if ids[end - 1] in marks:
            text = str(tokenizer.convert_ids_to_tokens(ids[end - 1]))
            group, special = [ids[end - 1]], True
            if end - 1 > start:
                pieces.append(
                    Piece(_decoded(tokenizer, ids[start : end - 1]), tuple(ids[start : end - 1]), kinds[start], False)
                )
        else:
            text, special = _behind(tokenizer, ids[start - 1] if start else None, group, marks), False
            ends_here = end == len(ids) or kinds[end] != kinds[start]
            if text.endswith(_PARTIAL) and len(group) < 6 and not ends_here:
                continue  # the first bytes of a character, whose others are in the next tokens
        pieces.append(Piece(text, tuple(group), kinds[end - 1], special))
        start = end
    return pieces


def _behind(tokenizer: PreTrainedTokenizerBase, before: int | None, group: list[int], marks: set[int]) -> str:
    """Return what a group adds to the token before it: some decoders take away the space before the first word."""
    if before is None or before in marks:
        return _decoded(tokenizer, group)
    alone, both = _decoded(tokenizer, [before]), _decoded(tokenizer, [before, *group])
    return both[len(alone) :] if both.startswith(alone) else _decoded(tokenizer, group)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
