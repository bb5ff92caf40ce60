"""Datasets as the package ``datasets`` holds and saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, quoted
from lorakit.training.data.mapped import MAPPED_BYTES, ArrowRows
from lorakit.training.data.table import Table

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def is_saved(folder: Path) -> bool:
    """Tell whether a folder is what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path) -> dict[str, Table]:
    """Read what ``save_to_disk`` wrote, memory-mapped.

    Raises:
        DataError: it is broken, or has no training rows.
    """
    import datasets
    import pyarrow

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"'{folder}' looks like a saved dataset, but cannot be read: {error}") from error
    return tables_of(found if isinstance(found, datasets.DatasetDict) else {"train": found}, str(folder))


def tables_of(splits: Mapping[Any, Dataset], source: str) -> dict[str, Table]:
    """Return each split under the name that lorakit has for it; a single split is for training.

    Raises:
        DataError: there are several and none is named train, or one is empty.
    """
    names = {str(name): part for name, part in splits.items()}
    found = {}
    for split, known in SPLIT_NAMES.items():
        fitting = [name for name in names if name.lower() in known]
        if fitting:
            found[split] = table_of(names[fitting[0]], f"{source}[{fitting[0]}]" if len(names) > 1 else source)
    if "train" not in found and len(names) == 1:
        found = {"train": table_of(next(iter(names.values())), source)}
    if "train" not in found:
        raise DataError(f"'{source}' has no split named 'train', but {quoted(list(names))}. Say one: {source}[SPLIT].")
    empty = [split for split, table in found.items() if not table.rows]
    if empty:
        raise DataError(f"'{source}': the split {quoted(empty)} has no rows.")
    return found


def table_of(dataset: Dataset, source: str) -> Table:
    """Return a dataset's rows; large ones stay in its file. Class numbers become class names."""
    import datasets

    classes = {
        name: list(feature.names)
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    columns = dataset.with_format("arrow")
    rows = ArrowRows(len(dataset), columns.__getitem__, dataset.size_in_bytes or 0, classes)
    return Table(source, rows if (dataset.size_in_bytes or 0) >= MAPPED_BYTES else tuple(rows), "record")
