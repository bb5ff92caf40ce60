"""Find out from the columns what the rows are examples of, and check every row against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorakit.errors import ConfigError, DataError, did_you_mean, quoted
from lorakit.training.data.checks import check_rows
from lorakit.training.data.columns import check_fields
from lorakit.training.data.layouts import LANGUAGE_MODELING, LAYOUTS, TASKS, Detection, Layout, columns_named
from lorakit.training.data.table import Table, name_reasons, name_rows

__all__ = ["Detection", "check_rows", "detect_task"]

Fit = tuple[Layout, dict[str, str]]


def detect_task(table: Table, task: str | None = None, columns: Mapping[str, str] | None = None) -> Detection:
    """Choose the task and the layout that the table's columns have, and check each row.

    Without ``task`` the columns must leave no doubt: language modeling needs 'text' alone. With it, further
    columns are left aside.

    Args:
        table: the rows.
        task: one of ``TASKS``.
        columns: the column of a field (``{"prompt": "question"}``), for those whose names do not say it; '' for a
            field that is to be left out.

    Raises:
        ConfigError: ``task`` is not one of the three; ``columns`` names no field or column that there is.
        DataError: no layout fits, or several do; rows mix layouts, lack a field or hold a wrong value (all named).
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"unknown task '{task}'. Tasks: {quoted(TASKS)}.{did_you_mean(task, TASKS)}")
    given = _checked(columns or {}, table)
    doubts: list[str] = []
    fitting = _fitting(table.columns, task, given, doubts)
    fitting = [fit for fit in fitting if _is_told(fit[0], fit[1], table)]
    tasks = list(dict.fromkeys(layout.task for layout, _ in fitting))
    if len(tasks) != 1:
        _refuse_a_mixture(table, task, given)
    if not fitting:
        raise _no_fit(table, task, doubts, given)
    if len(tasks) > 1:
        raise DataError(
            f"{table.source}: the columns {quoted(table.columns)} fit {quoted(tasks)}. Say which is meant with --task."
        )
    layout, found = fitting[0]
    unchecked = Detection(layout.task, layout.name, found, "")
    try:
        skipped = check_rows(table, unchecked)
    except DataError:
        _refuse_a_mixture(table, task, given)
        raise
    reason = _reason(layout, found, table, task, skipped)
    return Detection(layout.task, layout.name, found, reason, tuple(skipped))


def _checked(columns: Mapping[str, str], table: Table) -> Mapping[str, str]:
    check_fields(columns)
    missing = [column for column in columns.values() if column and column not in table.columns]
    if missing:
        near = "".join(did_you_mean(column, table.columns) for column in missing[:3])
        raise ConfigError(f"{table.source} has no column {quoted(missing)}. It has {quoted(table.columns)}.{near}")
    return columns


def _fitting(columns: Sequence[str], task: str | None, given: Mapping[str, str], doubts: list[str]) -> list[Fit]:
    found = []
    for layout in LAYOUTS:
        fields = {**layout.needed, **layout.optional}
        if task not in (None, layout.task) or any(column and name not in fields for name, column in given.items()):
            continue
        fit = _fit(layout, columns, given, doubts)
        alone = layout.task != LANGUAGE_MODELING or task is not None or len(columns) == 1 or "text" in given
        if fit is not None and alone:
            found.append((layout, fit))
    return found


def _fit(layout: Layout, columns: Sequence[str], given: Mapping[str, str], doubts: list[str]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    unclear: list[str] = []
    free = [column for column in columns if column not in given.values()]
    for name, names in {**layout.needed, **layout.optional}.items():
        named = columns_named(names, free) if name not in given else [column for column in [given[name]] if column]
        if not named and name in layout.needed:
            return None
        if len(named) > 1:
            unclear.append(
                f"the {name} for {layout.task} could be {quoted(named)}: rename the one meant to '{name}', or say "
                f"--columns {name}=COLUMN"
            )
        elif named:
            found[name] = named[0]
    doubts.extend(unclear)
    return None if unclear else found


def _is_told(layout: Layout, found: Mapping[str, str], table: Table) -> bool:
    """Tell whether some row has what makes this layout out, such as a history that is not empty."""
    if not layout.telling:
        return True
    telling = [found[name] for name in layout.telling if name in found]
    turns = [table.rows[0].fields.get(found[name]) for name in ("prompt", "completion") if name in found]
    if any(isinstance(value, (list, tuple)) for value in turns):
        return True
    return bool(telling) and any(row.fields.get(column) for row in table.rows for column in telling)


def _refuse_a_mixture(table: Table, task: str | None, given: Mapping[str, str]) -> None:
    """Refuse rows of several layouts in one table.

    Raises:
        DataError: there are several; the rows of each are named.
    """
    kinds: dict[tuple[str, ...], str | None] = {}
    numbers: dict[str, list[int]] = {}
    used: dict[str, set[str]] = {}
    for row in table.rows:
        columns = tuple(row.fields)
        if columns not in kinds:
            fits = _fitting(columns, task, given, [])
            layout, found = min(fits, key=lambda fit: bool(fit[0].telling)) if fits else (None, {})
            kinds[columns] = layout.words if layout is not None else None
            if layout is not None:
                used.setdefault(layout.words, set()).update(found.values())
        words = kinds[columns]
        if words is not None:
            numbers.setdefault(words, []).append(row.number)
    # Rows that have a part of the columns of others are rows of theirs in which a field is missing.
    if len(numbers) > 1 and not any(one < other for one in used.values() for other in used.values()):
        parts = "; ".join(f"{words} in {name_rows(rows, table.unit, 4)}" for words, rows in numbers.items())
        raise DataError(f"{table.source} mixes layouts: {parts}. Put each in a file of its own, and choose one.")


def _no_fit(table: Table, task: str | None, doubts: list[str], given: Mapping[str, str]) -> DataError:
    if doubts:
        return DataError(f"{table.source}: {'; '.join(dict.fromkeys(doubts))}.")
    layouts = [layout for layout in LAYOUTS if task in (None, layout.task) and not layout.telling]
    shown = {(layout.task, layout.words): layout for layout in reversed(layouts)}
    known = [f"  - {layout.task}: {layout.describe()}" for layout in reversed(shown.values())]
    names = [name for layout in layouts for aliases in layout.needed.values() for name in aliases]
    near = "".join(f" For '{column}':{did_you_mean(column, names)}" for column in _strange(table, names))
    wanted = f"do not fit the task '{task}'" if task else "fit no task"
    wanted += f" with {', '.join(f'{name}={column}' for name, column in given.items())}" if given else ""
    hint = "\nColumns of other names: --columns prompt=COLUMN,completion=COLUMN (or text=, label=, messages=, ...)."
    if table.source.lower().endswith((".csv", ".tsv")):
        hint += "\nThe first line of the file is taken as the column names."
    if columns_named(("chosen",), table.columns) and columns_named(("rejected",), table.columns):
        hint += "\nThese are preferences. To learn from the chosen answers: --columns completion=chosen (or messages=)."
    if task is None and columns_named(("text",), table.columns):
        hint += "\nTo learn from 'text' and leave the others aside: --task language-modeling."
    found = quoted(table.columns) if table.columns else "none"
    return DataError(
        "\n".join([f"{table.source}: the columns {found} {wanted}.{near} Needed is one of:", *known]) + hint
    )


def _strange(table: Table, names: list[str]) -> list[str]:
    unknown = [column for column in table.columns if column.strip().lower() not in names]
    return [column for column in unknown if did_you_mean(column.lower(), names)][:3]


def _reason(
    layout: Layout, found: Mapping[str, str], table: Table, task: str | None, skipped: Sequence[tuple[int, str]]
) -> str:
    used = list(found.values())
    aside = [column for column in table.columns if column not in used]
    kind = "ShareGPT conversations" if _is_sharegpt(found, table) else layout.words
    asked = "as asked; " if task else ""
    left = f", {len(skipped):,} skipped: {name_reasons(skipped, table.unit)}" if skipped else ""
    rest = f"; not used: {quoted(aside)}" if aside else ""
    return f"{asked}{kind} in {quoted(used)}, {len(table.rows):,} rows{left}{rest}"


def _is_sharegpt(found: Mapping[str, str], table: Table) -> bool:
    value = table.rows[0].fields.get(found.get("messages", ""))
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "from" in value[0]
