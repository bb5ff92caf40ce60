"""Rows of large files that stay on disk: JSONL by the place of its lines, columns of Arrow by record."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.training.data.table import LazyRows, Row

if TYPE_CHECKING:
    import pyarrow

CHUNK_BYTES = 8 * 2**20

MAPPED_BYTES = 32 * 2**20
"""Files of at least this size are read row by row from disk rather than held in memory."""


class LineRows(LazyRows):
    """The JSON objects of a file's lines, by where each line begins and ends; 24 bytes of memory a row."""

    chunk = 1

    def __init__(self, file: Path, numbers: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> None:
        with file.open("rb") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._numbers, self._starts, self._ends = array("q", numbers), array("q", starts), array("q", ends)

    def __len__(self) -> int:
        return len(self._numbers)

    def fetch(self, places: Sequence[int]) -> list[Row]:
        """Read the rows at these places."""
        return [Row(self._numbers[i], json.loads(self._bytes[self._starts[i] : self._ends[i]])) for i in places]


class Columns(Protocol):
    """What gives the records at some places as an Arrow table."""

    def __call__(self, places: list[int]) -> pyarrow.Table:
        """Return the records at these places."""


class ArrowRows(LazyRows):
    """Records of Arrow columns, made into Python values when they are asked for.

    Args:
        count: how many records there are.
        take: gives those at some places.
        num_bytes: of all records; some of them are made into values together, more where they are small.
        classes: the class names of columns that hold class numbers.
    """

    def __init__(
        self, count: int, take: Columns, num_bytes: int = 0, classes: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._count, self._take, self._classes = count, take, classes or {}
        self.chunk = max(1, min(self.chunk, CHUNK_BYTES * count // max(num_bytes, 1)))

    def __len__(self) -> int:
        return self._count

    def fetch(self, places: Sequence[int]) -> list[Row]:
        """Read the records at these places."""
        records = self._take(list(places)).to_pylist()
        return [Row(i + 1, self._fields(record)) for i, record in zip(places, records, strict=True)]

    def _fields(self, record: Mapping[str, Any]) -> dict[str, Any]:
        fields = {name: _without_padding(value) for name, value in record.items()}
        for column, names in self._classes.items():
            number = fields.get(column)
            if isinstance(number, int):
                # Hub sets mark an unknown class with -1: as no class at all, its row is skipped by number.
                fields[column] = names[number] if 0 <= number < len(names) else None
        return fields


def _without_padding(value: Any) -> Any:
    """Drop the empty fields of nested records: a column gives every record each name that occurs in any."""
    if isinstance(value, dict):
        return {name: _without_padding(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_padding(item) for item in value]
    return value
