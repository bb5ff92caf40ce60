"""``EncodedRow`` and sets of them: rows as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.text import supervise

IGNORED = -100


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model takes it.

    Attributes:
        input_ids: the tokens.
        labels: one per token (per target token for encoder-decoders), or the number of the class.
        number: the row's line or record.
        prompt: what the model is given, as ``lorakit.text.generate`` takes it; '' for language modeling.
        expected: the completion, the class name or the text.
        token_type_ids: which of two texts each token belongs to, for tokenizers that say so.
    """

    input_ids: list[int]
    labels: list[int] | int
    number: int
    prompt: str
    expected: str
    token_type_ids: list[int] | None = None

    @property
    def length(self) -> int:
        """The tokens on the longer side."""
        return max(len(self.input_ids), len(self.labels) if isinstance(self.labels, list) else 1)

    @property
    def given(self) -> int:
        """How many tokens come before the first that is learned (all, where none is)."""
        labels = self.labels if isinstance(self.labels, list) else [self.labels]
        return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


class EncodedRows(Sequence[EncodedRow]):
    """Encoded rows that are read when they are asked for."""


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, notes for the reader, and the ``separator`` that generation is to use."""

    rows: Sequence[EncodedRow]
    notes: tuple[str, ...]
    separator: str = supervise.SEPARATOR
