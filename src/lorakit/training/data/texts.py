"""Texts to classify, with or without labels beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lorakit.errors import DataError, did_you_mean, quoted
from lorakit.text.tokens import text_problem
from lorakit.training.data.layouts import LAYOUTS, columns_named
from lorakit.training.data.read import read_table
from lorakit.training.data.table import Row, Table, json_kind, rows_error

Texts = Sequence[str] | Sequence[tuple[str, str]]


def read_texts(path: str | Path, pairs: bool = False) -> Texts:
    """Read the texts of a file, or pairs of texts; other columns are left aside.

    Raises:
        DataError: there is no such file, no column of texts, or a row without a text (all named).
    """
    return texts_of(read_table(path), pairs)


def texts_of_lines(lines: Iterable[str], source: str = "stdin") -> list[str]:
    """Return the lines that are not blank, without their ends.

    Raises:
        DataError: there are none.
    """
    texts = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{source} has no lines. Give one text a line.")
    return texts


def texts_of(table: Table, pairs: bool = False) -> Texts:
    """Return a table's texts, or pairs of texts."""
    layout = next(layout for layout in LAYOUTS if layout.name == ("pair-label" if pairs else "text-label"))
    columns = [_column(table, layout.needed[name]) for name in ("text", *(["text_pair"] if pairs else []))]
    problems = []
    for row in table.rows:
        found = [problem for column in columns if (problem := _problem(row, column))]
        problems += [f"{table.unit} {row.number}: {found[0]}"] if found else []
    if problems:
        raise rows_error(table.source, problems, "Mend or remove these rows.")
    if pairs:
        return [(row.fields[columns[0]], row.fields[columns[1]]) for row in table.rows]
    return [row.fields[columns[0]] for row in table.rows]


def _column(table: Table, names: Sequence[str]) -> str:
    named = columns_named(names, table.columns)
    if len(named) == 1:
        return named[0]
    if named:
        raise DataError(f"{table.source}: the text could be {quoted(named)}. Rename the one meant to '{names[0]}'.")
    near = "".join(f" For '{column}':{did_you_mean(column.lower(), names)}" for column in table.columns[:3])
    near = near if "Closest" in near else ""
    raise DataError(
        f"{table.source} has no column '{names[0]}' (or {quoted(names[1:])}): {quoted(table.columns)}.{near}"
    )


def _problem(row: Row, column: str) -> str | None:
    value = row.fields.get(column)
    if value is None:
        return f"no '{column}'"
    if not isinstance(value, str):
        return f"'{column}' is {json_kind(value)}, not a text"
    if not value.strip():
        return f"'{column}' is empty"
    broken = text_problem(value)
    return f"'{column}' {broken}" if broken else None
