"""Find out from the columns what the rows are examples of, and check every row against it."""

from __future__ import annotations

from lorakit.errors import ConfigError, DataError, did_you_mean, quoted
from lorakit.text.chat import message_problem
from lorakit.text.tokens import text_problem
from lorakit.training.data.layouts import (
    LANGUAGE_MODELING,
    LAYOUTS,
    TASKS,
    Detection,
    Layout,
    columns_named,
)
from lorakit.training.data.table import Row, Table, json_kind, rows_error

__all__ = ["Detection", "check_rows", "detect_task"]


def detect_task(table: Table, task: str | None = None) -> Detection:
    """Choose the task and the layout that the table's columns have, and check each row.

    Without ``task`` the columns must leave no doubt: language modeling needs 'text' alone. With it, further
    columns are left aside.

    Raises:
        ConfigError: ``task`` is not one of the three.
        DataError: no layout fits, or several do; a row lacks a field or holds a wrong value (all named).
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"unknown task '{task}'. Tasks: {quoted(TASKS)}.{did_you_mean(task, TASKS)}")
    fitting: list[tuple[Layout, dict[str, str]]] = []
    doubts: list[str] = []
    for layout in LAYOUTS:
        if task is not None and layout.task != task:
            continue
        columns = _fit(layout, table.columns, doubts)
        alone = layout.task != LANGUAGE_MODELING or task is not None or len(table.columns) == 1
        if columns is not None and alone:
            fitting.append((layout, columns))
    if not fitting:
        raise _no_fit(table, task, doubts)
    tasks = list(dict.fromkeys(layout.task for layout, _ in fitting))
    if len(tasks) > 1:
        raise DataError(
            f"{table.source}: the columns {quoted(table.columns)} fit {quoted(tasks)}. Say which is meant with --task."
        )
    layout, columns = fitting[0]
    detection = Detection(layout.task, layout.name, columns, _reason(layout, columns, table, task))
    check_rows(table, detection)
    return detection


def check_rows(table: Table, detection: Detection) -> None:
    """Check that each row has every field of the detected layout, with a value that can be used.

    Raises:
        DataError: some do not; each is named with its first fault.
    """
    problems = []
    for row in table.rows:
        problem = _row_problem(row, detection)
        if problem:
            problems.append(f"{table.unit} {row.number}: {problem}")
    if problems:
        raise rows_error(table.source, problems, "Mend or remove these rows.")


def _fit(layout: Layout, columns: tuple[str, ...], doubts: list[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    unclear: list[str] = []
    for name, names in {**layout.needed, **layout.optional}.items():
        named = columns_named(names, columns)
        if not named and name in layout.needed:
            return None
        if len(named) > 1:
            unclear.append(f"the {name} for {layout.task} could be {quoted(named)}: rename the one meant to '{name}'")
        elif named:
            found[name] = named[0]
    doubts.extend(unclear)
    return None if unclear else found


def _no_fit(table: Table, task: str | None, doubts: list[str]) -> DataError:
    if doubts:
        return DataError(f"{table.source}: {'; '.join(doubts)}.")
    layouts = [layout for layout in LAYOUTS if task in (None, layout.task)]
    known = [f"  - {layout.task}: {layout.describe()}" for layout in layouts]
    names = [name for layout in layouts for aliases in layout.needed.values() for name in aliases]
    near = "".join(f" For '{column}':{did_you_mean(column, names)}" for column in _strange(table, names))
    wanted = f"do not fit the task '{task}'" if task else "fit no task"
    hint = ""
    if table.source.lower().endswith((".csv", ".tsv")):
        hint = "\nThe first line of the file is taken as the column names."
    if task is None and columns_named(("text",), table.columns):
        hint += "\nTo learn from 'text' and leave the others aside: --task language-modeling."
    found = quoted(table.columns) if table.columns else "none"
    return DataError(
        "\n".join([f"{table.source}: the columns {found} {wanted}.{near} Needed is one of:", *known]) + hint
    )


def _strange(table: Table, names: list[str]) -> list[str]:
    unknown = [column for column in table.columns if column.strip().lower() not in names]
    return [column for column in unknown if did_you_mean(column.lower(), names)][:3]


def _reason(layout: Layout, columns: dict[str, str], table: Table, task: str | None) -> str:
    used = list(columns.values())
    aside = [column for column in table.columns if column not in used]
    asked = "as asked; " if task else ""
    rest = f"; not used: {quoted(aside)}" if aside else ""
    return f"{asked}the data has {quoted(used)}{rest}"


def _row_problem(row: Row, detection: Detection) -> str | None:
    for name, column in detection.columns.items():
        value = row.fields.get(column)
        if name == "messages":
            problem = "no 'messages'" if value is None else message_problem(value)
        elif name == "label":
            problem = _label_problem(value, column)
        else:
            problem = _text_problem(value, column, optional=name == "input")
        if problem:
            return problem
    return None


def _label_problem(value: object, column: str) -> str | None:
    if value is None:
        return f"no '{column}'"
    if isinstance(value, str):
        return None if value.strip() else f"'{column}' is empty"
    if isinstance(value, int):
        return None
    if isinstance(value, float):
        return f"'{column}' is {value}: a class needs a name or a whole number"
    return f"'{column}' is {json_kind(value)}, not a class name"


def _text_problem(value: object, column: str, optional: bool) -> str | None:
    if value is None:
        return None if optional else f"no '{column}'"
    if not isinstance(value, str):
        return f"'{column}' is {json_kind(value)}, not a text"
    if not value.strip():
        return None if optional else f"'{column}' is empty"
    broken = text_problem(value)
    return f"'{column}' {broken}" if broken else None
