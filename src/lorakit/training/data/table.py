"""Rows of examples, and how messages name them."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from lorakit.errors import DataError

SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Row:
    """One example: its fields, and the number of the line or record it stands in (from 1)."""

    number: int
    fields: dict[str, Any]


class LazyRows(Sequence[Row], ABC):
    """Rows that stay in their file and are read when they are asked for, ``chunk`` at a time."""

    chunk = 1024

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def fetch(self, places: Sequence[int]) -> list[Row]:
        """Read the rows at these places (from 0)."""

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        places = range(len(self))[place]
        return self.fetch([places])[0] if isinstance(places, int) else self.fetch(places)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), self.chunk):
            yield from self.fetch(range(start, min(start + self.chunk, len(self))))


class ChosenRows(LazyRows):
    """Some of other rows, in their order."""

    def __init__(self, rows: LazyRows, places: Iterable[int]) -> None:
        self.rows = rows
        self.chunk = rows.chunk
        self.places = array("q", places)

    def __len__(self) -> int:
        return len(self.places)

    def fetch(self, places: Sequence[int]) -> list[Row]:
        """Read the rows at these places among the chosen."""
        return self.rows.fetch([self.places[place] for place in places])


@dataclass(frozen=True)
class Table:
    """The rows of one source, where they come from, and what ``Row.number`` counts: 'line' or 'record'."""

    source: str
    rows: Sequence[Row]
    unit: str

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every field name that occurs, in the order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.fields))

    def chosen(self, places: Sequence[int]) -> Table:
        """Return a table of the rows at these places (from 0)."""
        if isinstance(self.rows, LazyRows):
            return Table(self.source, ChosenRows(self.rows, places), self.unit)
        return Table(self.source, tuple(self.rows[place] for place in places), self.unit)


class JoinedRows(LazyRows):
    """The rows of several sources one after the other, numbered from the first to the last."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = parts
        self.chunk = min((part.chunk for part in parts if isinstance(part, LazyRows)), default=1024)
        self.ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def fetch(self, places: Sequence[int]) -> list[Row]:
        """Read the rows at these places; neighbours of one source together."""
        found: list[Row] = []
        for index, group in itertools.groupby(places, lambda place: bisect.bisect_right(self.ends, place)):
            part, wanted = self.parts[index], list(group)
            start = self.ends[index] - len(part)
            inside = [place - start for place in wanted]
            rows = part.fetch(inside) if isinstance(part, LazyRows) else [part[place] for place in inside]
            found += [Row(place + 1, row.fields) for place, row in zip(wanted, rows, strict=True)]
        return found


def joined(source: str, tables: Sequence[Table]) -> Table:
    """Return the rows of several tables as one, numbered as records from the first to the last."""
    rows = JoinedRows([table.rows for table in tables])
    lazy = any(isinstance(table.rows, LazyRows) for table in tables)
    return Table(source, rows if lazy else tuple(rows), "record")


def from_objects(source: str, values: Iterable[tuple[int, Any]], unit: str) -> Table:
    """Make a table of numbered values, each of which must be an object with named fields.

    Raises:
        DataError: some are not (all named).
    """
    rows: list[Row] = []
    problems: list[str] = []
    for number, value in values:
        if isinstance(value, Mapping):
            rows.append(Row(number, dict(value)))
        else:
            problems.append(f"{unit} {number}: {json_kind(value)}, not an object with named fields")
    if problems:
        raise rows_error(source, problems, 'Write each row as {"field": value, ...}.')
    return Table(source, tuple(rows), unit)


def json_kind(value: Any) -> str:
    """Return what a value is in a reader's words: 'a text', 'a number', 'a list', 'nothing' ..."""
    for kinds, words in (
        ((bool,), "true or false"),
        ((str,), "a text"),
        ((int, float), "a number"),
        ((list, tuple), "a list"),
        ((Mapping,), "an object"),
    ):
        if isinstance(value, kinds):
            return words
    return "nothing" if value is None else f"a {type(value).__name__}"


def name_rows(numbers: Sequence[int], unit: str, limit: int = SHOWN_PROBLEMS) -> str:
    """Return ``line 4`` or ``lines 4, 90, 1002 and 5 more``."""
    shown = ", ".join(str(number) for number in numbers[:limit])
    rest = f" and {len(numbers) - limit:,} more" if len(numbers) > limit else ""
    return f"{unit}{'' if len(numbers) == 1 else 's'} {shown}{rest}"


def name_reasons(problems: Iterable[tuple[int, str]], unit: str) -> str:
    """Return ``no assistant turn (lines 3, 9); 'text' is empty (line 4)``: numbered problems by what they are."""
    reasons: dict[str, list[int]] = {}
    for number, reason in problems:
        reasons.setdefault(reason, []).append(number)
    return "; ".join(f"{reason} ({name_rows(numbers, unit)})" for reason, numbers in reasons.items())


def rows_error(source: str, problems: Sequence[str], advice: str) -> DataError:
    """Return the error for rows that cannot be used: the first eight in full, the rest counted."""
    if len(problems) == 1:
        return DataError(f"{source}, {problems[0]}. {advice}")
    lines = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  - and {len(problems) - SHOWN_PROBLEMS:,} more")
    return DataError("\n".join([f"{source}: {len(problems):,} rows cannot be used.", *lines, advice]))
