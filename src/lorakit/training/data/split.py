"""Hold rows back for validation, and list the classes.

Rows whose input is the same, but for case and white space, stay on one side: a model that has seen the
answer cannot be tested with it.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.errors import DataError, quoted
from lorakit.training.data.checks import is_usable
from lorakit.training.data.examples import input_text
from lorakit.training.data.layouts import CLASSIFICATION, Detection, label_text
from lorakit.training.data.table import Row, Table, rows_error

MIN_ROWS = 4
MAX_FREE_LABELS = 50


@dataclass
class Group:
    """Rows with the same input: their places in the table, and how many there are of each class."""

    places: list[int] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.places)


def split_rows(
    table: Table, detection: Detection, fraction: float = 0.1, seed: int = 0, max_rows: int = 2000
) -> tuple[Table, Table]:
    """Part a table in training and validation rows, the same way for the same seed.

    The validation part has ``fraction`` of the rows, at least 1 and at most ``max_rows``. For classification
    each class gives its share, and keeps at least one row for training. Rows that teach nothing are not held
    back; they stay where encoding will name them.

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
        held = _held_by_class(groups, target)
    else:
        held = _take(groups, target, len(table.rows) - 1)
    places = {place for group in held for place in group.places}
    if not places:
        raise DataError(
            f"{table.source}: no row can be held back for validation: the inputs are all the same, or each "
            "class has one input only. Add rows, or give a folder with the files 'train' and 'validation'."
        )
    train = [place for place in range(len(table.rows)) if place not in places]
    return table.chosen(train), table.chosen(sorted(places))


def label_names(tables: Mapping[str, Table], detection: Detection) -> tuple[str, ...]:
    """List the classes of ``tables["train"]`` (or of the first table), sorted; numbers by value.

    Raises:
        DataError: there is one class only, the labels look like free text or measurements, or another table
            has labels that training never sees (named, with their rows).
    """
    name = "train" if "train" in tables else next(iter(tables))
    train = tables[name]
    counts = Counter(_label(row, detection) for row in train.rows if is_usable(row, detection))
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
        if other == name:
            continue
        usable = (row for row in table.rows if is_usable(row, detection))
        unseen = [row for row in usable if _label(row, detection) not in counts]
        if unseen:
            problems = [f"{table.unit} {row.number}: label '{_label(row, detection)}'" for row in unseen]
            advice = f"These labels are not in {train.source}, which has {quoted(_in_order(list(counts)))}."
            raise rows_error(table.source, problems, advice)
    return tuple(_in_order(list(counts)))


def same_input_key(text: str) -> bytes:
    """Return what two inputs share that are the same but for case and white space; short, as there may be many."""
    return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=12).digest()


def _groups(table: Table, detection: Detection) -> list[Group]:
    groups: dict[bytes, Group] = {}
    for place, row in enumerate(table.rows):
        if not is_usable(row, detection):
            continue
        group = groups.setdefault(same_input_key(input_text(row, detection)), Group())
        group.places.append(place)
        if detection.task == CLASSIFICATION:
            group.labels[_label(row, detection)] += 1
    return list(groups.values())


def _held_by_class(groups: Sequence[Group], target: int) -> list[Group]:
    by_class: dict[str, list[Group]] = {}
    sizes: Counter[str] = Counter()
    for group in groups:
        sizes.update(group.labels)
        if len(group.labels) == 1:  # an input that has two labels is no fair question: it stays in training
            by_class.setdefault(next(iter(group.labels)), []).append(group)
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
