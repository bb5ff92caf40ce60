"""Encoding rows some at a time: what every task shares, from skipped rows to the cache on disk."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, TrainingError
from lorakit.training.data import cache
from lorakit.training.data.checks import row_problem
from lorakit.training.data.encoded import EncodedRow, EncodedSet
from lorakit.training.data.layouts import Detection
from lorakit.training.data.table import Row, Table, name_reasons, name_rows, rows_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Told how many rows are done, of how many."""

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 4_000_000

_log = logging.getLogger(__name__)


class Encoding(ABC):
    """Turns the rows of a table into tokens, once through, and remembers what the reader should know.

    Args:
        table: the rows.
        detection: their layout.
        tokenizer: the model's.
        max_length: tokens in a row.
    """

    def __init__(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.table, self.detection, self.tokenizer, self.max_length = table, detection, tokenizer, max_length
        self.skipped: list[tuple[int, str]] = []
        self.long: list[int] = []
        self.full: list[int] = []
        self.count = 0

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Encode some rows; those that cannot be learned from are left out and noted."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return all that decides the result beside rows and tokenizer, as JSON values."""

    def rest(self) -> list[EncodedRow]:
        """Return what is still to come after the last row."""
        return []

    def separator(self) -> str:
        """Return what stands between prompt and completion."""
        return ""

    def check(self) -> None:
        """Complain of what the rows, all of them, have shown.

        Raises:
            DataError: there is nothing to learn from.
        """
        if 2 * len(self.skipped) > len(self.table.rows):
            problems = [f"{self.table.unit} {number}: {reason}" for number, reason in self.skipped]
            raise rows_error(self.table.source, problems, "Mend or remove these rows.")
        if not self.count:
            notes = " ".join(self.notes())
            raise DataError(f"{self.table.source}: no row is left. {notes} Allow more tokens or shorten the rows.")

    def notes(self) -> tuple[str, ...]:
        """Return what was skipped, cut or left out."""
        found = []
        if self.skipped:
            found.append(
                f"{len(self.skipped):,} of {len(self.table.rows):,} rows skipped: "
                f"{name_reasons(self.skipped, self.table.unit)}."
            )
        if self.long:
            found.append(self.note(self.long, f"left out: longer than {self.max_length:,} tokens"))
        if self.full:
            found.append(self.note(self.full, f"left out: the prompt alone fills the {self.max_length:,} tokens"))
        return tuple(found)

    def note(self, numbers: Sequence[int], what: str) -> str:
        """Return a note that names rows."""
        total = len(self.table.rows)
        return f"{len(numbers):,} of {total:,} rows {what} ({name_rows(numbers, self.table.unit)})."

    def rows(self, progress: Progress | None = None) -> Iterator[EncodedRow]:
        """Yield every encoded row, then check the whole."""
        done, total = 0, len(self.table.rows)
        for rows in self._chunks():
            for row in self.encode(rows):
                self.count += 1
                yield row
            done += len(rows)
            if progress is not None:
                progress(done, total)
        for row in self.rest():
            self.count += 1
            yield row
        self.check()
        if progress is not None:
            progress(total, total)

    def _chunks(self) -> Iterator[list[Row]]:
        waiting: list[Row] = []
        size = 0
        for row in self.table.rows:
            problem = row_problem(row, self.detection)
            if problem is not None:
                self.skipped.append((row.number, problem.text))
                continue
            waiting.append(row)
            size += _characters(row.fields)
            if len(waiting) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                yield waiting
                waiting, size = [], 0
        if waiting:
            yield waiting


def encode_with(make: Callable[[], Encoding], progress: Progress | None) -> EncodedSet:
    """Encode rows, or read them from the cache if they are many and were encoded before.

    Args:
        make: a fresh encoding, as one is good for one pass.
        progress: told of rows done.
    """
    encoding = make()
    folder = cache.cache_folder()
    if len(encoding.table.rows) < cache.LEAST_ROWS or folder is None or not encoding.tokenizer.is_fast:
        return EncodedSet(tuple(encoding.rows(progress)), encoding.notes(), encoding.separator())
    entry = cache.Entry(folder, cache.content_key(encoding.table, encoding.tokenizer, encoding.settings()))
    found = entry.read()
    if found is not None:
        rows, facts = found
        if progress is not None:
            progress(len(encoding.table.rows), len(encoding.table.rows))
        return EncodedSet(rows, tuple(facts["notes"]), facts["separator"])

    def facts_now() -> dict[str, Any]:
        return {"notes": list(encoding.notes()), "separator": encoding.separator(), "count": encoding.count}

    try:
        rows = entry.write(encoding.rows(progress), facts_now)
    except (OSError, TrainingError) as error:
        _log.warning("the encoded rows could not be kept for the next time: %s", error)
        encoding = make()
        return EncodedSet(tuple(encoding.rows(progress)), encoding.notes(), encoding.separator())
    return EncodedSet(rows, encoding.notes(), encoding.separator())


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_characters(item) for item in value)
    return 1
