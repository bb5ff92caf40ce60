"""One reader per kind of file, each from a path to a table."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, quoted
from lorakit.training.data.table import Row, Table, from_objects, json_kind, rows_error


def _text(file: Path) -> str:
    data = file.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"'{file}' is UTF-16 text. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With 'utf-8-sig' the position counts from behind the mark, in the bytes that the error carries.
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise DataError(
            f"'{file}' is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}, "
            f"byte {column} of it. Save it as UTF-8."
        ) from error


def _read_jsonl(file: Path) -> Table:
    return _jsonl(str(file), _text(file))


def _jsonl(source: str, text: str) -> Table:
    values: list[tuple[int, Any]] = []
    problems: list[str] = []
    # Not splitlines(): it also cuts at U+2028 and others that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}, column {error.colno}: {error.msg}")
            continue
        if isinstance(value, dict):
            values.append((number, value))
        else:
            problems.append(f"line {number}: {json_kind(value)}, not an object with named fields")
    if problems:
        raise rows_error(source, problems, 'A line must be one whole JSON object: {"field": value, ...}.')
    return from_objects(source, values, "line")


def _read_json(file: Path) -> Table:
    text = _text(file)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl(str(file), text)
        raise DataError(f"{file}, line {error.lineno}, column {error.colno}: {error.msg}. Mend the JSON.") from error
    if isinstance(value, list):
        return from_objects(str(file), enumerate(value, start=1), "record")
    if isinstance(value, dict) and "\n" not in text.strip():
        return _jsonl(str(file), text)
    inside = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    hint = f" It has lists under {quoted(inside)}: save one of them as the file." if inside else ""
    raise DataError(f"{file} holds {json_kind(value)}; a list of objects is needed.{hint}")


def _read_csv(file: Path) -> Table:
    text = _text(file)
    header = text.partition("\n")[0]
    return _delimited(str(file), text, max(",;\t", key=header.count))


def _read_tsv(file: Path) -> Table:
    return _delimited(str(file), _text(file), "\t")


def _delimited(source: str, text: str, delimiter: str) -> Table:
    rows: list[Row] = []
    problems: list[str] = []
    records = _records(text, delimiter, problems)
    _, names = next(records, (1, []))
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or "" in names or twice:
        wrong = f"the name {quoted(twice)} twice" if twice else "a column without a name"
        raise DataError(f"{source}: the first line must name the columns; it has {wrong}.")
    for number, values in records:
        if len(values) == len(names):
            rows.append(Row(number, dict(zip(names, values, strict=True))))
        elif values:
            problems.append(f"line {number}: {len(values)} fields, but the first line names {len(names)} columns")
    if problems:
        raise rows_error(
            source, problems, 'Put a field that holds the delimiter in quotes, and double quotes in it: "".'
        )
    return Table(source, tuple(rows), "line")


def _records(text: str, delimiter: str, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it starts in; a broken one goes to ``problems`` and ends the file."""
    old_limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        start = 1
        try:
            for values in reader:
                yield start, values
                start = reader.line_num + 1
        except csv.Error as error:
            problems.append(f"line {start}: {error}")
    finally:
        csv.field_size_limit(old_limit)


def _read_parquet(file: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"'{file}' is not a whole Parquet file: {error}") from error
    return from_objects(str(file), enumerate(records, start=1), "record")


def _read_text(file: Path) -> Table:
    rows: list[Row] = []
    paragraph: list[str] = []
    lines = _text(file).replace("\r\n", "\n").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            rows.append(Row(number - len(paragraph), {"text": "\n".join(paragraph)}))
            paragraph = []
    return Table(str(file), tuple(rows), "line")


# By suffix. A reader may return no rows; the caller complains.
READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
