"""Rows of examples, and how messages name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import DataError

SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Row:
    """One example: its fields, and the number of the line or record it stands in (from 1)."""

    number: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one file, where they come from, and what ``Row.number`` counts: 'line' or 'record'."""

    source: str
    rows: tuple[Row, ...]
    unit: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Every field name that occurs, in the order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.fields))


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


def rows_error(source: str, problems: Sequence[str], advice: str) -> DataError:
    """Return the error for rows that cannot be used: the first eight in full, the rest counted."""
    if len(problems) == 1:
        return DataError(f"{source}, {problems[0]}. {advice}")
    lines = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  - and {len(problems) - SHOWN_PROBLEMS:,} more")
    return DataError("\n".join([f"{source}: {len(problems):,} rows cannot be used.", *lines, advice]))
