"""Hold rows back for validation, and list the classes.

Rows whose input is the same, but for case and white space, stay on one side: a model that has seen the
answer cannot be tested with it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from lorakit.errors import DataError, quoted
from lorakit.training.data.layouts import CLASSIFICATION, Detection, input_text, label_text
from lorakit.training.data.table import Row, Table, rows_error

MIN_ROWS = 4
MAX_FREE_LABELS = 50

Group = list[Row]


def split_rows(
    table: Table, detection: Detection, fraction: float = 0.1, seed: int = 0, max_rows: int = 2000
) -> tuple[Table, Table]:
    """Part a table in training and validation rows, the same way for the same seed.

    The validation part has ``fraction`` of the rows, at least 1 and at most ``max_rows``. For classification
    each class gives its share, and keeps at least one row for training.

    Returns:
        The training table and the validation table, each in the table's order.

    Raises:
        DataError: fewer than four rows, or nothing can be held back because the inputs are all the same.
    """
    if len(table.rows) < MIN_ROWS:
        raise DataError(
            f"{table.source} has {len(table.rows)} row{'s' if len(table.rows) > 1 else ''}; at least "
            f"{MIN_ROWS} are needed to train on some and validate on others. Add rows."
        )
    target = max(1, min(round(fraction * len(table.rows)), max_rows))
    groups = _groups(table, detection)
    shuffler = random.Random(seed)
    shuffler.shuffle(groups)
    if detection.task == CLASSIFICATION:
        held = _held_by_class(groups, detection, target)
    else:
        held = _take(groups, target, len(table.rows) - 1)
    numbers = {row.number for group in held for row in group}
    if not numbers:
        raise DataError(
            f"{table.source}: no row can be held back for validation: the inputs are all the same, or each "
            "class has one input only. Add rows, or give a folder with the files 'train' and 'validation'."
        )
    train = tuple(row for row in table.rows if row.number not in numbers)
    validation = tuple(row for row in table.rows if row.number in numbers)
    return Table(table.source, train, table.unit), Table(table.source, validation, table.unit)


def label_names(tables: Mapping[str, Table], detection: Detection) -> tuple[str, ...]:
    """List the classes of ``tables["train"]`` (or of the first table), sorted; numbers by value.

    Raises:
        DataError: there is one class only, the labels look like free text or measurements, or another table
            has labels that training never sees (named, with their rows).
    """
    name = "train" if "train" in tables else next(iter(tables))
    train = tables[name]
    counts = Counter(_label(row, detection) for row in train.rows)
    column = detection.columns["label"]
    if len(counts) == 1:
        only = next(iter(counts))
        raise DataError(f"{train.source}: every '{column}' is '{only}'. At least two classes are needed.")
    if len(counts) > MAX_FREE_LABELS and len(counts) > len(train.rows) / 2:
        examples = quoted([_short(label) for label in counts], limit=3)
        raise DataError(
            f"{train.source}: '{column}' has {len(counts):,} different values in {len(train.rows):,} rows "
            f"({examples}): free text or measurements, not classes. Give a column of classes, or "
            "'prompt' and 'completion' to generate text."
        )
    for other, table in tables.items():
        unseen = [row for row in table.rows if _label(row, detection) not in counts]
        if unseen and other != name:
            problems = [f"{table.unit} {row.number}: label '{_label(row, detection)}'" for row in unseen]
            advice = f"These labels are not in {train.source}, which has {quoted(_in_order(list(counts)))}."
            raise rows_error(table.source, problems, advice)
    return tuple(_in_order(list(counts)))


def _groups(table: Table, detection: Detection) -> list[Group]:
    groups: dict[str, Group] = {}
    for row in table.rows:
        key = " ".join(input_text(row, detection).split()).casefold()
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _held_by_class(groups: Sequence[Group], detection: Detection, target: int) -> list[Group]:
    by_class: dict[str, list[Group]] = {}
    sizes: Counter[str] = Counter()
    for group in groups:
        labels = {_label(row, detection) for row in group}
        sizes.update(_label(row, detection) for row in group)
        if len(labels) == 1:  # an input that has two labels is no fair question: it stays in training
            by_class.setdefault(labels.pop(), []).append(group)
    quotas = _quotas(sizes, target)
    held: list[Group] = []
    for label in sorted(by_class):
        held += _take(by_class[label], quotas[label], sizes[label] - 1)
    return held


def _quotas(sizes: Mapping[str, int], target: int) -> dict[str, int]:
    """Divide ``target`` among the classes by size: whole parts first, then the largest remainders."""
    total = sum(sizes.values())
    shares = {label: size * target / total for label, size in sizes.items()}
    quotas = {label: int(share) for label, share in shares.items()}
    # Largest remainder; among equals the larger class, which can better spare a row, then by name.
    order = sorted(shares, key=lambda label: (quotas[label] - shares[label], -sizes[label], label))
    for label in order[: target - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def _take(groups: Sequence[Group], quota: int, at_most: int) -> list[Group]:
    """Take whole groups up to ``quota`` rows; if the first ones are all larger, the smallest one."""
    taken: list[Group] = []
    count = 0
    for group in groups:
        if count + len(group) <= min(quota, at_most):
            taken.append(group)
            count += len(group)
    if not taken and quota > 0 and groups:
        smallest = min(groups, key=len)
        return [smallest] if len(smallest) <= at_most else []
    return taken


def _label(row: Row, detection: Detection) -> str:
    return label_text(detection.value(row, "label"))


def _in_order(labels: list[str]) -> list[str]:
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
