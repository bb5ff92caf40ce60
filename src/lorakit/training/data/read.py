"""Read files of examples: JSONL, JSON, CSV, TSV, Parquet, or plain text in paragraphs.

Every row keeps the number a reader finds it by (the line of a text file, the record of a JSON list or
a Parquet file), so that later complaints can name it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, did_you_mean, quoted
from lorakit.training.data.parse import READERS
from lorakit.training.data.table import Row, Table, from_objects

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Row", "Table", "read_splits", "read_table", "table_from_rows"]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def read_table(path: str | Path) -> Table:
    """Read one file; its suffix says how.

    JSONL and NDJSON hold an object a line; JSON a list of objects (or JSONL); CSV and TSV have their column
    names in the first line (a CSV may use ``;`` or tabs); TXT holds paragraphs parted by blank lines, each a
    row with the field 'text'. Text files are UTF-8, with or without a byte order mark.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, not UTF-8, or has broken rows (all named).
    """
    file = Path(path)
    _must_exist(file)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"'{file}' ends in '{file.suffix}'. Files of examples that are read: {_suffixes()}.")
    if file.stat().st_size == 0:
        raise DataError(f"'{file}' is empty (0 bytes). Put one example in each row.")
    try:
        table = reader(file)
    except PermissionError as error:
        raise DataError(f"'{file}' may not be read by this user. Change its permissions.") from error
    if not table.rows:
        raise DataError(f"'{file}' has no rows. Put one example in each row.")
    return table


def read_splits(path: str | Path) -> dict[str, Table]:
    """Read a file as ``{"train": table}``, or a folder's files named train, validation and test.

    Raises:
        DataError: as ``read_table``; or a folder without a train file, or with two files for one split.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"train": read_table(folder)}
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    found: dict[str, list[Path]] = {
        split: [file for file in files if file.stem.lower() in names] for split, names in SPLIT_NAMES.items()
    }
    for split, several in found.items():
        if len(several) > 1:
            names = quoted([file.name for file in several])
            raise DataError(f"'{folder}' has several {split} files: {names}. Keep one, or give a file.")
    if not found["train"]:
        seen = quoted([file.name for file in files]) if files else "no file of examples"
        raise DataError(
            f"'{folder}' has no file named 'train' ({_suffixes()}); found {seen}. "
            "Rename the training file to 'train', or give the file itself."
        )
    return {split: read_table(files[0]) for split, files in found.items() if files}


def table_from_rows(rows: Iterable[Mapping[str, Any]] | Dataset, source: str = "rows") -> Table:
    """Make a table of dictionaries, or of a ``datasets.Dataset`` (whose class numbers become class names).

    Raises:
        DataError: there are no rows, or some are not dictionaries (all named).
    """
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(f"{source}: a list of dictionaries is needed, found {type(rows).__name__}.")
    names = _class_names(rows)
    table = from_objects(source, enumerate(rows, start=1), "record")
    if not table.rows:
        raise DataError(f"{source}: there are no rows. Give one dictionary per example.")
    for row in table.rows:
        for column, classes in names.items():
            number = row.fields.get(column)
            if isinstance(number, int) and 0 <= number < len(classes):
                row.fields[column] = classes[number]
    return table


def _must_exist(file: Path) -> None:
    if file.is_dir():
        raise DataError(f"'{file}' is a folder; a file of examples is needed ({_suffixes()}).")
    if not file.is_file():
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        where = "" if file.parent.is_dir() else f" The folder '{file.parent}' does not exist either."
        raise DataError(f"there is no file '{file}'.{where}{did_you_mean(file.name, beside)}")


def _suffixes() -> str:
    return ", ".join(READERS)


def _class_names(rows: object) -> dict[str, list[str]]:
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(rows, datasets.Dataset):
        return {}
    return {
        name: list(feature.names) for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)
    }
