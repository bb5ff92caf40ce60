"""Can a row be learned from? If not: is it broken, or whole but without anything to learn?"""

from __future__ import annotations

from lorakit.errors import DataError
from lorakit.text.messages import Conversation, Problem
from lorakit.text.tokens import text_problem
from lorakit.training.data.examples import row_conversation
from lorakit.training.data.layouts import MESSAGES, Detection
from lorakit.training.data.table import Row, Table, json_kind, name_reasons, rows_error

_MAY_BE_EMPTY = ("input", "history", "system", "tools")


def row_problem(row: Row, detection: Detection) -> Problem | None:
    """Return what is wrong with a row; with ``skip`` set where it is whole but teaches nothing."""
    for name, column in detection.columns.items():
        if column not in row.fields and name not in _MAY_BE_EMPTY:
            return Problem(f"no '{column}'")
        problem = _value_problem(row.fields.get(column), name, column, detection)
        if problem:
            return problem
    if detection.layout == MESSAGES:
        talk = row_conversation(row, detection)
        return None if isinstance(talk, Conversation) else talk
    return None


def is_usable(row: Row, detection: Detection) -> bool:
    """Tell whether a row is learned from."""
    return row_problem(row, detection) is None


def usable_places(table: Table, detection: Detection) -> list[int]:
    """Return the places (from 0) of the rows that are learned from."""
    return [place for place, row in enumerate(table.rows) if is_usable(row, detection)]


def check_rows(table: Table, detection: Detection) -> list[tuple[int, str]]:
    """Check each row against the layout.

    Returns:
        The numbers of the rows that teach nothing, each with why; they are left out of everything.

    Raises:
        DataError: some rows are broken (all named), or more than half of them teach nothing.
    """
    broken: list[str] = []
    skipped: list[tuple[int, str]] = []
    for row in table.rows:
        problem = row_problem(row, detection)
        if problem and problem.skip:
            skipped.append((row.number, problem.text))
        elif problem:
            broken.append(f"{table.unit} {row.number}: {problem.text}")
    if broken:
        raise rows_error(table.source, broken, "Mend or remove these rows.")
    if 2 * len(skipped) > len(table.rows):
        raise DataError(
            f"{table.source}: {len(skipped):,} of {len(table.rows):,} rows have nothing to learn from: "
            f"{name_reasons(skipped, table.unit)}. Is another column meant? Say it with --columns; else mend the rows."
        )
    return skipped


def _value_problem(value: object, name: str, column: str, detection: Detection) -> Problem | None:
    if name == "label":
        return _label_problem(value, column)
    listed = detection.layout == MESSAGES and isinstance(value, (list, tuple))
    if name in ("messages", "history", "tools") or listed:
        return Problem(f"'{column}' is empty", skip=True) if name == "messages" and not value else None
    return _text_problem(value, column, optional=name in _MAY_BE_EMPTY)


def _label_problem(value: object, column: str) -> Problem | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return Problem(f"'{column}' is empty", skip=True)
    if isinstance(value, (str, int)):
        return None
    if isinstance(value, float):
        return Problem(f"'{column}' is {value}: a class needs a name or a whole number")
    return Problem(f"'{column}' is {json_kind(value)}, not a class name")


def _text_problem(value: object, column: str, optional: bool) -> Problem | None:
    if value is None:
        return None if optional else Problem(f"'{column}' is empty", skip=True)
    if not isinstance(value, str):
        return Problem(f"'{column}' is {json_kind(value)}, not a text")
    if not value.strip():
        return None if optional else Problem(f"'{column}' is empty", skip=True)
    broken = text_problem(value)
    return Problem(f"'{column}' {broken}") if broken else None
