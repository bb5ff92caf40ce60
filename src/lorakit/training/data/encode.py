"""Rows as token ids and labels, with a note of everything that was cut or left out.

A masked label is -100. Labels stand at the position of their own token; shifting them is the loss's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import DataError, quoted
from lorakit.text import supervise
from lorakit.text.chat import Messages, chat_passage
from lorakit.text.tokens import Passage, encode_passages, end_of_sequence, special_prefix
from lorakit.training.data.layouts import Detection, input_text, label_text
from lorakit.training.data.table import Row, Table, name_rows, rows_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, notes for the reader, and the ``separator`` that generation is to use."""

    rows: tuple[EncodedRow, ...]
    notes: tuple[str, ...]
    separator: str = supervise.SEPARATOR


def encode_classification(
    table: Table,
    detection: Detection,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
) -> EncodedSet:
    """Encode texts, or pairs of texts, with the number of their class in ``labels``.

    Texts of more than ``max_length`` tokens are cut at the end, and the notes say which.

    Raises:
        DataError: a row's label is not in ``labels`` (all named).
    """
    numbers = {label: number for number, label in enumerate(labels)}
    names = [label_text(detection.value(row, "label")) for row in table.rows]
    unknown = [
        f"{table.unit} {row.number}: label '{name}'"
        for row, name in zip(table.rows, names, strict=True)
        if name not in numbers
    ]
    if unknown:
        raise rows_error(table.source, unknown, f"The classes are {quoted(list(labels))}.")
    texts = [str(detection.value(row, "text")) for row in table.rows]
    pairs = [str(detection.value(row, "text_pair")) for row in table.rows]
    inputs = (texts, pairs) if "text_pair" in detection.columns else (texts,)
    whole = tokenizer(*inputs, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    long = [row.number for row, ids in zip(table.rows, whole["input_ids"], strict=True) if len(ids) > max_length]
    encoded = tokenizer(*inputs, truncation=True, max_length=max_length, return_attention_mask=False)
    types = encoded.get("token_type_ids") if len(inputs) == 2 else None
    rows = tuple(
        EncodedRow(
            input_ids=encoded["input_ids"][index],
            labels=numbers[name],
            number=row.number,
            prompt=input_text(row, detection),
            expected=name,
            token_type_ids=types[index] if types else None,
        )
        for index, (row, name) in enumerate(zip(table.rows, names, strict=True))
    )
    return EncodedSet(rows, (_note(table, long, f"cut to {max_length:,} tokens"),) if long else ())


def encode_generation(
    table: Table,
    detection: Detection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: bool,
    encoder_decoder: bool = False,
) -> EncodedSet:
    """Encode prompts and completions, instructions and outputs, or conversations; what is given is masked.

    Rows of more than ``max_length`` tokens are left out whole, and the notes say which.

    Args:
        table: the rows.
        detection: their layout.
        tokenizer: the model's.
        max_length: tokens in a row (for encoder-decoders: on either side).
        chat: write prompts and completions as messages; conversations always are.
        encoder_decoder: the labels are the completion's tokens, the inputs the prompt's.

    Raises:
        DataError: a row has nothing to learn from or cannot be rendered (all named), or all are too long.
    """
    chat = chat or detection.layout == "messages"
    examples = [_example(row, detection, chat) for row in table.rows]
    separator = _common_separator([completion for _, completion, _ in examples])
    if encoder_decoder:
        rows = _source_and_target(table, examples, tokenizer, chat)
    else:
        rows = _one_sequence(table, examples, tokenizer, chat)
    kept, notes = _fitting(table, rows, max_length)
    return EncodedSet(kept, notes, separator)


def encode_language_modeling(
    table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedSet:
    """Join all texts, each closed with the end of sequence, and cut them in blocks of ``max_length`` tokens.

    The last, shorter block is kept if there is anything to predict in it. A block's number is that of the
    row it begins in.

    Raises:
        DataError: all texts together are one token.
    """
    texts = [str(detection.value(row, "text")) for row in table.rows]
    before, end = special_prefix(tokenizer), end_of_sequence(tokenizer)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    stream: list[int] = []
    owners: list[int] = []
    for index, ids in enumerate(encoded["input_ids"]):
        stream += [*before, *ids, end]
        owners += [index] * (len(before) + len(ids) + 1)
    rows = []
    for start in range(0, len(stream), max_length):
        block = stream[start : start + max_length]
        owner = owners[start]
        if len(block) > 1:
            rows.append(EncodedRow(block, list(block), table.rows[owner].number, "", texts[owner]))
    if not rows:
        raise DataError(f"{table.source}: all texts together have one token. Add text.")
    return EncodedSet(tuple(rows), ())


Example = tuple[str, str, Messages | None]


def _example(row: Row, detection: Detection, chat: bool) -> Example:
    """Return a row's prompt, its completion, and the conversation if it is one."""
    if detection.layout == "messages":
        messages: Messages = detection.value(row, "messages")
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return messages[first - 1]["content"], messages[first]["content"], messages
    if detection.layout == "instruction-output":
        instruction, given = detection.value(row, "instruction"), detection.value(row, "input") or ""
        write = supervise.instruction_message if chat else supervise.instruction_prompt
        return write(instruction, given), detection.value(row, "output"), None
    return detection.value(row, "prompt"), detection.value(row, "completion"), None


def _one_sequence(
    table: Table, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> list[EncodedRow]:
    passages: list[Passage] = []
    problems: list[str] = []
    for row, (prompt, completion, messages) in zip(table.rows, examples, strict=True):
        try:
            if messages is not None:
                passages.append(chat_passage(tokenizer, messages))
            else:
                passages.append(supervise.completion_passage(tokenizer, prompt, completion, chat))
        except DataError as error:
            problems.append(f"{table.unit} {row.number}: {error}")
    if problems:
        raise rows_error(table.source, problems, "Mend or remove these rows.")
    rows = []
    marked = encode_passages(tokenizer, passages)
    for row, (prompt, completion, _), (ids, mask) in zip(table.rows, examples, marked, strict=True):
        labels = [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]
        rows.append(EncodedRow(ids, labels, row.number, prompt, completion))
    return rows


def _source_and_target(
    table: Table, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> list[EncodedRow]:
    sources: list[str] = []
    targets: list[str] = []
    for prompt, completion, messages in examples:
        given: str | Messages = prompt
        if messages is not None:
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            given, completion = messages[:last], messages[last]["content"]
        sources.append(supervise.source_text(tokenizer, given, chat))
        targets.append(completion)
    inputs = supervise.source_tokens(tokenizer, sources)
    labels = supervise.target_tokens(tokenizer, targets)
    return [
        EncodedRow(ids, target, row.number, prompt, completion)
        for row, (prompt, completion, _), ids, target in zip(table.rows, examples, inputs, labels, strict=True)
    ]


def _fitting(
    table: Table, rows: Sequence[EncodedRow], max_length: int
) -> tuple[tuple[EncodedRow, ...], tuple[str, ...]]:
    """Leave out the rows that are too long; refuse those that have nothing to learn from."""
    masked = [row.number for row in rows if _given_length(row) == len(_labels(row))]
    if masked:
        raise DataError(
            f"{table.source}: {_counted(masked, len(rows))} nothing to learn from: every label is masked "
            f"({name_rows(masked, table.unit)}). Give each a completion."
        )
    kept: list[EncodedRow] = []
    full: list[int] = []
    long: list[int] = []
    for row in rows:
        length = max(len(row.input_ids), len(_labels(row)))
        if length <= max_length:
            kept.append(row)
        elif _given_length(row) >= max_length:
            full.append(row.number)
        else:
            long.append(row.number)
    notes = []
    if long:
        notes.append(_note(table, long, f"left out: longer than {max_length:,} tokens"))
    if full:
        notes.append(_note(table, full, f"left out: the prompt alone fills the {max_length:,} tokens"))
    if not kept:
        raise DataError(f"{table.source}: no row is left. {' '.join(notes)} Allow more tokens or shorten the rows.")
    return tuple(kept), tuple(notes)


def _labels(row: EncodedRow) -> list[int]:
    return row.labels if isinstance(row.labels, list) else [row.labels]


def _given_length(row: EncodedRow) -> int:
    """Return how many tokens come before the first that is learned (all, where none is)."""
    labels = _labels(row)
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


def _common_separator(completions: Sequence[str]) -> str:
    return "" if all(supervise.separator_for(text) == "" for text in completions) else supervise.SEPARATOR


def _note(table: Table, numbers: Sequence[int], what: str) -> str:
    total = len(table.rows)
    return f"{len(numbers):,} of {total:,} rows {what} ({name_rows(numbers, table.unit)})."


def _counted(numbers: Sequence[int], total: int) -> str:
    return f"{len(numbers):,} of {total:,} rows {'has' if len(numbers) == 1 else 'have'}"
