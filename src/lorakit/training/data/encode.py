"""Rows as token ids and labels, with a note of everything that was cut or left out.

A masked label is -100. Labels stand at the position of their own token; shifting them is the loss's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, quoted
from lorakit.text import supervise
from lorakit.text.chat import chat_passages
from lorakit.text.template import moves_system, never_ends_a_turn
from lorakit.text.tokens import Passage, encode_passages, end_of_sequence, special_prefix
from lorakit.training.data.encoded import IGNORED, EncodedRow, EncodedSet
from lorakit.training.data.encoding import Encoding, Progress, encode_with
from lorakit.training.data.examples import Example, input_text, read_example
from lorakit.training.data.layouts import MESSAGES, Detection, label_text
from lorakit.training.data.table import Row, Table, rows_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "EncodedRow",
    "EncodedSet",
    "encode_classification",
    "encode_generation",
    "encode_language_modeling",
]

_SHOWN_CHARACTERS = 1000


def encode_classification(
    table: Table,
    detection: Detection,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    progress: Progress | None = None,
) -> EncodedSet:
    """Encode texts, or pairs of texts, with the number of their class in ``labels``.

    Texts of more than ``max_length`` tokens are cut at the end, and the notes say which.

    Raises:
        DataError: a row's label is not in ``labels`` (all named).
    """
    return encode_with(lambda: _Classes(table, detection, tokenizer, labels, max_length), progress)


def encode_generation(
    table: Table,
    detection: Detection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: bool,
    encoder_decoder: bool = False,
    progress: Progress | None = None,
) -> EncodedSet:
    """Encode prompts and completions, instructions and outputs, or conversations; what is given is masked.

    Of a conversation every answer of the assistant is learned, save those with ``"weight": 0``; of one for an
    encoder-decoder the last. Rows of more than ``max_length`` tokens are left out whole, and the notes say which.

    Args:
        table: the rows.
        detection: their layout.
        tokenizer: the model's.
        max_length: tokens in a row (for encoder-decoders: on either side).
        chat: write prompts and completions as messages; conversations always are.
        encoder_decoder: the labels are the completion's tokens, the inputs the prompt's.
        progress: told of rows done.

    Raises:
        DataError: more than half of the rows have nothing to learn from or cannot be rendered (all named), or
            all are too long.
    """
    chat = chat or detection.layout == MESSAGES
    kind = _TwoSides if encoder_decoder else _Sequences
    return encode_with(lambda: kind(table, detection, tokenizer, max_length, chat), progress)


def encode_language_modeling(
    table: Table,
    detection: Detection,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    progress: Progress | None = None,
) -> EncodedSet:
    """Join all texts, each closed with the end of sequence, and cut them in blocks of ``max_length`` tokens.

    The last, shorter block is kept if there is anything to predict in it. A block's number is that of the
    row it begins in.

    Raises:
        DataError: all texts together are one token.
    """
    return encode_with(lambda: _Blocks(table, detection, tokenizer, max_length), progress)


class _Classes(Encoding):
    def __init__(
        self,
        table: Table,
        detection: Detection,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
    ) -> None:
        super().__init__(table, detection, tokenizer, max_length)
        self.labels = list(labels)
        self.numbers = {label: number for number, label in enumerate(labels)}
        self.unknown: list[str] = []

    def settings(self) -> Mapping[str, Any]:
        return {"columns": self.detection.columns, "labels": self.labels, "max_length": self.max_length}

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        known = []
        for row in rows:
            name = label_text(self.detection.value(row, "label"))
            if name in self.numbers:
                known.append((row, name))
            else:
                self.unknown.append(f"{self.table.unit} {row.number}: label '{name}'")
        if not known:
            return []
        ids, types = self._tokens([row for row, _ in known])
        return [
            EncodedRow(
                input_ids=ids[index],
                labels=self.numbers[name],
                number=row.number,
                prompt=input_text(row, self.detection),
                expected=name,
                token_type_ids=types[index] if types else None,
            )
            for index, (row, name) in enumerate(known)
        ]

    def _tokens(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]] | None]:
        texts = [str(self.detection.value(row, "text")) for row in rows]
        pairs = [str(self.detection.value(row, "text_pair")) for row in rows]
        inputs = (texts, pairs) if "text_pair" in self.detection.columns else (texts,)
        found = self.tokenizer(*inputs, return_attention_mask=False, verbose=False)
        long = [index for index, ids in enumerate(found["input_ids"]) if len(ids) > self.max_length]
        ids, types = list(found["input_ids"]), found.get("token_type_ids") if len(inputs) == 2 else None
        if long:
            self.long += [rows[index].number for index in long]
            chosen = [[column[index] for index in long] for column in inputs]
            cut = self.tokenizer(*chosen, truncation=True, max_length=self.max_length, return_attention_mask=False)
            for place, index in enumerate(long):
                ids[index] = cut["input_ids"][place]
                if types:
                    types[index] = cut["token_type_ids"][place]
        return ids, types

    def check(self) -> None:
        if self.unknown:
            raise rows_error(self.table.source, self.unknown, f"The classes are {quoted(self.labels)}.")
        super().check()

    def notes(self) -> tuple[str, ...]:
        cut, self.long = self.long, []
        found = super().notes()
        self.long = cut
        return (*found, *([self.note(cut, f"cut to {self.max_length:,} tokens")] if cut else []))


class _Written(Encoding):
    """What encodings of prompts and completions share."""

    def __init__(
        self,
        table: Table,
        detection: Detection,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        chat: bool,
    ) -> None:
        super().__init__(table, detection, tokenizer, max_length)
        self.chat = chat
        self.begin_blank = True
        self.moved = self.rewritten = self.parts = 0

    def settings(self) -> Mapping[str, Any]:
        return {
            "columns": self.detection.columns,
            "layout": self.detection.layout,
            "max_length": self.max_length,
            "chat": self.chat,
            "sides": type(self).__name__,
        }

    def separator(self) -> str:
        return "" if self.begin_blank else supervise.SEPARATOR

    def examples(self, rows: Sequence[Row]) -> list[tuple[Row, Example]]:
        found = [(row, read_example(row, self.detection, self.chat)) for row in rows]
        self.begin_blank &= all(supervise.separator_for(example.completion) == "" for _, example in found)
        self.moved += sum(e.talk is not None and moves_system(self.tokenizer, e.talk) for _, e in found)
        return found

    def fitting(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Leave out the rows that are too long, and those in which nothing is learned."""
        kept = []
        for row in rows:
            if row.given == (len(row.labels) if isinstance(row.labels, list) else 1):
                self.skipped.append((row.number, "nothing to learn from: every label is masked"))
            elif row.length <= self.max_length:
                kept.append(row)
            else:
                (self.full if row.given >= self.max_length else self.long).append(row.number)
        return kept

    def notes(self) -> tuple[str, ...]:
        found = list(super().notes())
        if self.moved:
            found.append(
                f"in {self.moved:,} rows the system message is put before the user's first message: the model's chat "
                "template has no place for it."
            )
        if self.rewritten:
            found.append(
                f"{self.rewritten:,} rows are learned in {self.parts:,} parts: the model's chat template writes "
                "earlier answers in another way than new ones."
            )
        if self.chat and never_ends_a_turn(self.tokenizer):
            found.append(
                "the model's chat template writes nothing behind an answer: the model cannot learn to stop. Give it a "
                "template that ends a turn."
            )
        return tuple(found)


class _Sequences(_Written):
    """Prompt and completion in one sequence."""

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        passages: list[Passage] = []
        owners: list[tuple[Row, Example]] = []
        for row, example in self.examples(rows):
            try:
                made = self._passages(example)
            except DataError as error:
                self.skipped.append((row.number, str(error).rstrip(".")))
                continue
            self.rewritten += len(made) > 1
            self.parts += len(made) if len(made) > 1 else 0
            passages += made
            owners += [(row, example)] * len(made)
        found = []
        marked = encode_passages(self.tokenizer, passages)
        for (row, example), (ids, mask) in zip(owners, marked, strict=True):
            labels = [token if kept else IGNORED for token, kept in zip(ids, mask, strict=True)]
            found.append(EncodedRow(ids, labels, row.number, example.prompt, example.completion))
        return self.fitting(found)

    def _passages(self, example: Example) -> list[Passage]:
        if example.talk is not None:
            return chat_passages(self.tokenizer, example.talk)
        return [supervise.completion_passage(self.tokenizer, example.prompt, example.completion, self.chat)]


class _TwoSides(_Written):
    """Prompt and completion on the two sides of an encoder-decoder; of a conversation the last answer."""

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        examples = self.examples(rows)
        sources, targets = [], []
        for _, example in examples:
            given: Any = example.prompt
            completion = example.completion
            if example.talk is not None:
                last = example.talk.learned[-1]
                given, completion = example.talk.messages[:last], example.talk.messages[last]["content"]
            sources.append(supervise.source_text(self.tokenizer, given, self.chat))
            targets.append(completion)
        inputs = supervise.source_tokens(self.tokenizer, sources)
        labels = supervise.target_tokens(self.tokenizer, targets)
        return self.fitting(
            [
                EncodedRow(ids, target, row.number, example.prompt, example.completion)
                for (row, example), ids, target in zip(examples, inputs, labels, strict=True)
            ]
        )


class _Blocks(Encoding):
    """Texts end to end, cut in blocks."""

    def __init__(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(table, detection, tokenizer, max_length)
        self.before, self.end = special_prefix(tokenizer), end_of_sequence(tokenizer)
        self.stream: list[int] = []
        self.owners: list[tuple[int, Row]] = []  # where in the stream each row begins

    def settings(self) -> Mapping[str, Any]:
        return {"columns": self.detection.columns, "blocks": True, "max_length": self.max_length}

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        texts = [str(self.detection.value(row, "text")) for row in rows]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        for row, ids in zip(rows, encoded["input_ids"], strict=True):
            self.owners.append((len(self.stream), row))
            self.stream += [*self.before, *ids, self.end]
        return self._cut(len(self.stream) - len(self.stream) % self.max_length)

    def rest(self) -> list[EncodedRow]:
        return self._cut(len(self.stream)) if len(self.stream) > 1 else []

    def _cut(self, end: int) -> list[EncodedRow]:
        rows, owner = [], 0
        for start in range(0, end, self.max_length):
            while owner + 1 < len(self.owners) and self.owners[owner + 1][0] <= start:
                owner += 1
            row = self.owners[owner][1]
            block = self.stream[start : start + self.max_length]
            text = str(self.detection.value(row, "text"))[:_SHOWN_CHARACTERS]
            rows.append(EncodedRow(block, list(block), row.number, "", text))
        left = [(place - end, row) for place, row in self.owners if place >= end]
        reaching = [(0, row) for place, row in self.owners if place < end][-1:] if len(self.stream) > end else []
        started = bool(left) and left[0][0] == 0
        self.owners = left if started else [*reaching, *left]
        self.stream = self.stream[end:]
        return rows

    def check(self) -> None:
        if not self.count and not self.skipped:
            raise DataError(f"{self.table.source}: all texts together have one token. Add text.")
        super().check()
