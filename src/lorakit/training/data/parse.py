"""One reader per kind of file, each from a path to a table; compressed files are read through."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import DataError, quoted
from lorakit.training.data.mapped import MAPPED_BYTES, ArrowRows, LineRows
from lorakit.training.data.table import Row, Table, from_objects, json_kind, rows_error

COMPRESSIONS = (".gz", ".zst")
_MARK = b"\xef\xbb\xbf"


def kind_of(file: Path) -> str:
    """Return the suffix that says how a file is read: ``.jsonl`` for ``rows.jsonl.gz``."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def stem_of(file: Path) -> str:
    """Return a file's name without the suffixes that say how it is read."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSIONS else file.stem


def _opened(file: Path) -> io.BufferedIOBase:
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        # Arrow's stream has no lines of its own.
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return gzip.open(file) if suffix == ".gz" else file.open("rb")


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Turn what reading says of a compressed file that ends too early, or is none, into one error."""
    try:
        yield
    except PermissionError:
        raise
    except (EOFError, zlib.error, OSError) as error:
        if file.suffix.lower() not in COMPRESSIONS:
            raise
        raise DataError(f"'{file}' is not a whole compressed file: {error}. Copy it again.") from error


def _text(file: Path) -> str:
    with _whole(file), _opened(file) as opened:
        data = opened.read()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"'{file}' is UTF-16 text. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With 'utf-8-sig' the position counts from behind the mark, in the bytes that the error carries.
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise _not_utf8(file, error, line, column) from error


def _not_utf8(file: Path, error: UnicodeDecodeError, line: int, column: int) -> DataError:
    return DataError(
        f"'{file}' is not UTF-8: byte 0x{error.object[error.start]:02x} in line {line}, "
        f"byte {column} of it. Save it as UTF-8."
    )


def _read_jsonl(file: Path) -> Table:
    """Read a file's lines one by one; a large one is only indexed, and its rows stay on disk."""
    mapped = file.suffix.lower() not in COMPRESSIONS and file.stat().st_size >= MAPPED_BYTES
    rows: list[Row] = []
    numbers, starts, ends = array("q"), array("q"), array("q")
    problems: list[str] = []
    for number, start, end, line in _lines(file):
        value = _object(number, line, problems)
        if value is None:
            continue
        if mapped:
            numbers.append(number)
            starts.append(start)
            ends.append(end)
        else:
            rows.append(Row(number, value))
    _complain(str(file), problems)
    return Table(str(file), LineRows(file, numbers, starts, ends) if mapped and numbers else tuple(rows), "line")


def _lines(file: Path) -> Iterator[tuple[int, int, int, str]]:
    """Yield the number, the first and last byte, and the text of each line that is not blank."""
    place, number = 0, 0
    try:
        with _whole(file), _opened(file) as opened:
            # Only '\n' ends a line: JSON allows U+2028 and others inside a text.
            for number, line in enumerate(opened, start=1):
                start, content = place, line
                place += len(line)
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"'{file}' is UTF-16 text. Save it as UTF-8.")
                if number == 1 and line.startswith(_MARK):
                    start, content = len(_MARK), line[len(_MARK) :]
                if content.strip():
                    yield number, start, place, content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error, number, error.start + 1) from error


def _object(number: int, line: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        problems.append(f"line {number}, column {error.colno}: {error.msg}")
        return None
    except RecursionError:
        problems.append(f"line {number}: nested too deeply")
        return None
    if isinstance(value, dict):
        return value
    problems.append(f"line {number}: {json_kind(value)}, not an object with named fields")
    return None


def _complain(source: str, problems: list[str]) -> None:
    if problems:
        raise rows_error(source, problems, 'A line must be one whole JSON object: {"field": value, ...}.')


def _jsonl(source: str, text: str) -> Table:
    problems: list[str] = []
    lines = enumerate(text.split("\n"), start=1)
    found = [(number, _object(number, line, problems)) for number, line in lines if line.strip()]
    _complain(source, problems)
    return Table(source, tuple(Row(number, value) for number, value in found if value is not None), "line")


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
        records = parquet.read_table(file, memory_map=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"'{file}' is not a whole Parquet file: {error}") from error
    return _records_table(file, records)


def _read_arrow(file: Path) -> Table:
    import pyarrow

    try:
        mapped = pyarrow.memory_map(str(file))
        try:
            records = pyarrow.ipc.open_stream(mapped).read_all()
        except pyarrow.ArrowInvalid:
            records = pyarrow.ipc.open_file(mapped).read_all()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"'{file}' is not a whole Arrow file: {error}") from error
    return _records_table(file, records)


def _records_table(file: Path, records: Any) -> Table:
    rows = ArrowRows(len(records), records.take, records.nbytes)
    kept = rows if file.stat().st_size >= MAPPED_BYTES or records.nbytes >= MAPPED_BYTES else tuple(rows)
    return Table(str(file), kept, "record")


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
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
