"""Read examples: a file, a folder of files for training and validation, a saved dataset, a name on the hub.

Every row keeps the number a reader finds it by (the line of a text file, the record of a list or a table), so that
later complaints can name it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, did_you_mean
from lorakit.training.data.folders import read_folder
from lorakit.training.data.hub import may_be_hub_name, read_hub
from lorakit.training.data.parse import COMPRESSIONS, READERS, kind_of
from lorakit.training.data.saved import table_of
from lorakit.training.data.table import Row, Table, from_objects

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Row", "Table", "read_splits", "read_table", "table_from_rows"]


def read_table(path: str | Path) -> Table:
    """Read one file; its suffix says how, and ``.gz`` or ``.zst`` may follow it.

    JSONL and NDJSON hold an object a line; JSON a list of objects (or JSONL); CSV and TSV have their column
    names in the first line (a CSV may use ``;`` or tabs); TXT holds paragraphs parted by blank lines, each a
    row with the field 'text'. Text files are UTF-8, with or without a byte order mark. The rows of large JSONL,
    Parquet and Arrow files are not held as Python objects.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, not UTF-8, or has broken rows (all named).
    """
    file = Path(path)
    _must_exist(file)
    reader = READERS.get(kind_of(file))
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
    """Read the rows of a file, a folder, a saved dataset or a hub name, by what they are for.

    A file is ``{"train": table}``. A folder holds files named train, validation and test, whole or in shards, or
    folders of such names, or is what ``datasets`` has saved. A text that is no place on this machine may be a hub name:
    ``org/name``, ``org/name:config``, ``org/name@revision``, ``org/name[split]``.

    Raises:
        DataError: as ``read_table``; or a folder without training rows, or with two files for one split; or a hub
            name that cannot be had.
    """
    place = Path(path)
    if place.is_dir():
        return read_folder(place, read_table)
    if not place.exists() and isinstance(path, str) and may_be_hub_name(path, (*READERS, *COMPRESSIONS)):
        return read_hub(path)
    return {"train": read_table(place)}


def table_from_rows(rows: Iterable[Mapping[str, Any]] | Dataset, source: str = "rows") -> Table:
    """Make a table of dictionaries, or of a ``datasets.Dataset`` (whose class numbers become class names).

    Raises:
        DataError: there are no rows, or some are not dictionaries (all named).
    """
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(f"{source}: a list of dictionaries is needed, found {type(rows).__name__}.")
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        table = table_of(rows, source)
    else:
        table = from_objects(source, enumerate(rows, start=1), "record")
    if not table.rows:
        raise DataError(f"{source}: there are no rows. Give one dictionary per example.")
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
