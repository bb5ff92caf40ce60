"""Folders of examples: which file is for training, which to validate on, and shards put together again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lorakit.errors import DataError, quoted
from lorakit.training.data.parse import READERS, kind_of, stem_of
from lorakit.training.data.saved import SPLIT_NAMES, is_saved, read_saved
from lorakit.training.data.table import Table, joined

_SHARD = re.compile(r"^(?P<name>.+?)[-_.](?P<number>\d{1,6})(?:-of-(?P<count>\d{1,6}))?(?:-[0-9a-f]{16})?$")

Read = Callable[[Path], Table]


def read_folder(folder: Path, read: Read) -> dict[str, Table]:
    """Read a folder's splits.

    Known are files named after a split (``train.jsonl``, ``dev.csv``), their shards (``train-00000-of-00002.parquet``),
    folders named after a split, all of these in a folder ``data``, and what ``datasets`` saves.

    Raises:
        DataError: nothing is for training, several files are for one split, or a shard is missing.
    """
    if is_saved(folder):
        return read_saved(folder)
    found = _by_split(folder)
    if "train" not in found and (folder / "data").is_dir():
        found = {**_by_split(folder / "data"), **found}
    if "train" not in found:
        files = _examples(folder)
        seen = quoted([file.name for file in files]) if files else "no file of examples"
        raise DataError(
            f"'{folder}' has no file named 'train' ({', '.join(READERS)}); found {seen}. "
            "Rename the training file to 'train', or give the file itself."
        )
    return {split: _together(files, read) for split, files in found.items()}


def _examples(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and kind_of(file) in READERS)


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split: one, or all shards of one."""
    files = _examples(folder)
    found: dict[str, list[Path]] = {}
    for split, names in SPLIT_NAMES.items():
        whole = [file for file in files if stem_of(file).lower() in names]
        shards = [file for file in files if file not in whole and (_shard_name(file) or "") in names]
        inside = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.lower() in names]
        beneath = [_examples(entry) for entry in inside]
        sources = [*([file] for file in whole), *([shards] if shards else []), *(part for part in beneath if part)]
        if len(sources) > 1:
            shown = quoted([f"{part[0].relative_to(folder)}" + (", ..." if len(part) > 1 else "") for part in sources])
            raise DataError(f"'{folder}' has several {split} files: {shown}. Keep one, or give a file.")
        if sources:
            _check_shards(folder, sources[0])
            found[split] = sources[0]
    return found


def _shard_name(file: Path) -> str | None:
    match = _SHARD.match(stem_of(file))
    return match["name"].lower() if match else None


def _check_shards(folder: Path, files: list[Path]) -> None:
    matches = [match for file in files if (match := _SHARD.match(stem_of(file)))]
    counts = {int(match["count"]) for match in matches if match["count"]}
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise DataError(f"'{folder}': the parts of one split are of several kinds, {quoted(kinds)}. Keep one kind.")
    if len(counts) > 1:
        raise DataError(
            f"'{folder}' has shards of several sets ({quoted([file.name for file in files])}). Keep one set."
        )
    if counts:
        numbers = {int(match["number"]) for match in matches}
        missing = [number for number in range(counts.pop()) if number not in numbers]
        if missing:
            shown = ", ".join(str(number) for number in missing[:8]) + (" ..." if len(missing) > 8 else "")
            raise DataError(
                f"'{folder}': beside '{files[0].name}' shard {shown} is missing. Fetch it, or rename the rest."
            )


def _together(files: list[Path], read: Read) -> Table:
    if len(files) == 1:
        return read(files[0])
    name = _shard_name(files[0])
    place = files[0].parent / f"{name}-*{kind_of(files[0])}" if name else files[0].parent
    return joined(f"{place} ({len(files)} files)", [read(file) for file in files])
