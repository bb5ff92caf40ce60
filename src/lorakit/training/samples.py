"""A few held-out rows answered, before and after: predictions of a classifier, continuations of a writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.records import Sample
from lorakit.training.data.encode import EncodedRow
from lorakit.training.scores import probabilities
from lorakit.training.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answers", "answer", "paired", "probabilities", "questions"]

Answers = list[str]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]
) -> Answers:
    """Answer rows, chosen by :func:`questions`, with the model as it is now."""
    return spec.kind.answer(model, tokenizer, rows)


def paired(before: Answers, after: Answers, rows: Sequence[EncodedRow], spec: TaskSpec) -> tuple[Sample, ...]:
    """Put answers to the same rows from before and after side by side; of many the most telling."""
    return spec.kind.paired(before, after, rows)


def questions(tokenizer: PreTrainedTokenizerBase, spec: TaskSpec, rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
    """Choose the rows to answer: all for a classifier, for a writer the first few that leave room for an answer."""
    return spec.kind.questions(tokenizer, rows)
