"""What is odd about rows, in words: doubles, rare classes, answers that say nothing, rows on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.errors import quoted
from lorakit.text.chat import end_of_turn_ids
from lorakit.training.data.checks import is_usable
from lorakit.training.data.encoded import EncodedRow, EncodedSet
from lorakit.training.data.examples import input_text, read_example
from lorakit.training.data.layouts import CLASSIFICATION, GENERATION, Detection, label_text
from lorakit.training.data.split import same_input_key
from lorakit.training.data.table import Row, Table, name_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_ROWS = 8
LARGE_RATIO = 10
CHECKED_ENDS = 500


def warnings_of(
    train: Table,
    held: Table,
    detection: Detection,
    encoded: EncodedSet,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
) -> tuple[str, ...]:
    """Return what is odd about rows.

    Args:
        train: rows to train on.
        held: rows to validate on.
        detection: the layout of both.
        encoded: the training rows, encoded.
        tokenizer: the model's.
        chat: answers end with the chat template's end of turn.
    """
    found = [*_doubles(train, held, detection)]
    if detection.task == CLASSIFICATION:
        found += _classes(train, detection)
    if detection.task == GENERATION:
        found += _answers(encoded, tokenizer, train.unit, chat)
    left_out = len(train.rows) - len({row.number for row in encoded.rows})
    if detection.task == GENERATION and 10 * left_out > len(train.rows):
        share = 100 * left_out / len(train.rows)
        found.append(f"{share:.0f} % of the rows are left out (see the notes): allow more tokens, or shorten the rows.")
    return tuple(found)


def label_counts(table: Table, detection: Detection) -> dict[str, int]:
    """Return how many rows each class has, most first."""
    usable = (row for row in table.rows if is_usable(row, detection))
    return dict(Counter(label_text(detection.value(row, "label")) for row in usable).most_common())


def _doubles(train: Table, held: Table, detection: Detection) -> list[str]:
    answers: dict[bytes, set[bytes]] = {}
    first: dict[bytes, int] = {}
    doubles: list[int] = []
    disagreeing: list[int] = []
    for row in train.rows:
        if not is_usable(row, detection):
            continue
        asked, answered = _keys(row, detection)
        seen = answers.setdefault(asked, set())
        if answered in seen:
            doubles.append(row.number)
        elif seen:
            disagreeing.append(row.number)
        seen.add(answered)
        first.setdefault(asked, row.number)
    both = [
        row.number
        for row in held.rows
        if is_usable(row, detection) and same_input_key(input_text(row, detection)) in first
    ]
    found = []
    if doubles:
        found.append(f"{len(doubles):,} rows are copies of earlier ones ({name_rows(doubles, train.unit)}).")
    if disagreeing and detection.task == CLASSIFICATION:
        where = name_rows(disagreeing, train.unit)
        found.append(f"{len(disagreeing):,} rows have the text of an earlier row and another label ({where}).")
    if both:
        where = name_rows(both, held.unit)
        found.append(
            f"{len(both):,} validation rows have the input of a training row ({where}): they measure what was seen."
        )
    return found


def _keys(row: Row, detection: Detection) -> tuple[bytes, bytes]:
    if detection.task == CLASSIFICATION:
        answer = label_text(detection.value(row, "label"))
    elif detection.task == GENERATION:
        answer = read_example(row, detection, chat=False).completion
    else:
        answer = ""
    return same_input_key(input_text(row, detection)), same_input_key(answer)


def _classes(train: Table, detection: Detection) -> list[str]:
    counts = label_counts(train, detection)
    rare = [f"{label} ({count})" for label, count in counts.items() if count < FEW_ROWS]
    found = []
    if rare:
        found.append(f"classes with fewer than {FEW_ROWS} rows: {quoted(rare)}. They are hardly learned.")
    most, least = max(counts.values()), min(counts.values())
    if most >= LARGE_RATIO * least and most >= LARGE_RATIO:
        large, small = next(iter(counts)), list(counts)[-1]
        found.append(
            f"classes are unbalanced: '{large}' has {most:,} rows, '{small}' {least:,}. Accuracy alone will mislead; "
            "read the F1 of each class."
        )
    return found


def _answers(encoded: EncodedSet, tokenizer: PreTrainedTokenizerBase, unit: str, chat: bool) -> list[str]:
    found = []
    short = [row.number for row in encoded.rows if len(row.expected.strip()) < 2]
    if short:
        found.append(f"{len(short):,} rows have an answer of one character ({name_rows(short, unit)}).")
    ends = end_of_turn_ids(tokenizer) if chat else [tokenizer.eos_token_id]
    endless = [row.number for row in encoded.rows[:CHECKED_ENDS] if not _ends(row, ends)]
    if endless:
        found.append(
            f"no token that ends an answer is learned in {len(endless):,} rows ({name_rows(endless, unit)}): the model "
            "will not learn to stop."
        )
    return found


def _ends(row: EncodedRow, ends: Sequence[object]) -> bool:
    return isinstance(row.labels, list) and any(label in ends for label in row.labels if label >= 0)
