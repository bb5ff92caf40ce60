"""Rows that stay in their file: the same as in memory, and no more memory than some of them take."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.training.data.detect import detect_task
from lorakit.training.data.mapped import MAPPED_BYTES, ArrowRows, LineRows
from lorakit.training.data.read import read_table
from lorakit.training.data.split import split_rows
from lorakit.training.data.table import LazyRows, Row, Table, joined

MEBIBYTE = 2**20


def large(folder: Path, count: int = 34, size: int = MEBIBYTE, start: bytes = b"", end: str = "\n") -> Path:
    """Write rows of a mebibyte, so that the file is above the size from which it is mapped."""
    path = folder / "rows.jsonl"
    with path.open("wb") as file:
        file.write(start)
        for number in range(count):
            row = {"prompt": f"é {number}", "completion": "x" * size}
            file.write((json.dumps(row, ensure_ascii=False) + end).encode())
    return path


@pytest.mark.parametrize(("start", "end"), [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n"), (b"\n\n", "\n \n")])
def test_a_large_file_is_read_row_by_row(tmp_path: Path, start: bytes, end: str) -> None:
    path = large(tmp_path, start=start, end=end)
    table = read_table(path)

    assert isinstance(table.rows, LineRows)
    assert path.stat().st_size > MAPPED_BYTES
    assert [row.fields["prompt"] for row in table.rows] == [f"é {number}" for number in range(34)]
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    assert all(json.loads(lines[row.number - 1])["prompt"] == row.fields["prompt"] for row in table.rows)


def test_reading_checking_and_splitting_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = large(tmp_path, count=16, size=10 * MEBIBYTE)
    tracemalloc.start()
    table = read_table(path)
    split_rows(table, detect_task(table))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # A row is there as bytes, as text and as a value, and the next is read before the last is given up; not all 16.
    assert peak < 7 * 10 * MEBIBYTE


def test_a_broken_line_of_a_large_file_is_named(tmp_path: Path) -> None:
    path = large(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"prompt": \n')

    with pytest.raises(DataError, match="line 35, column 12: Expecting value"):
        read_table(path)


class Numbers(LazyRows):
    """Rows that are their own place."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, places: Any) -> list[Row]:
        return [Row(place + 1, {"n": place}) for place in places]


def values(rows: Any) -> list[int]:
    return [row.fields["n"] for row in rows]


def test_rows_are_a_sequence() -> None:
    rows = Numbers(3000)

    assert values(rows) == list(range(3000))
    assert (rows[5].fields, rows[-1].fields, values(rows[2:9:3])) == ({"n": 5}, {"n": 2999}, [2, 5, 8])
    with pytest.raises(IndexError):
        rows[3000]


def test_chosen_rows_keep_their_numbers() -> None:
    table = Table("n", Numbers(3000), "record").chosen(range(0, 3000, 2)).chosen([1, 1000])

    assert [row.number for row in table.rows] == [3, 2001]


def test_joined_rows_are_numbered_through() -> None:
    table = joined("both", [Table("a", Numbers(1500), "line"), Table("b", (Row(9, {"n": -1}),), "line")])

    assert values(table.rows) == [*range(1500), -1]
    assert [row.number for row in table.rows[1498:]] == [1499, 1500, 1501]
    assert values(table.rows.fetch([1500, 3, 4])) == [-1, 3, 4]  # type: ignore[attr-defined]


def test_columns_give_records_without_names_that_only_others_have() -> None:
    import pyarrow

    turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "f"}]
    columns = pyarrow.Table.from_pylist([{"messages": turns, "system": None}, {"messages": turns[:1], "system": "s"}])
    rows = ArrowRows(len(columns), columns.take)

    assert [row.fields for row in rows] == [
        {"messages": turns, "system": None},
        {"messages": turns[:1], "system": "s"},
    ]


def test_large_columns_stay_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    texts = [str(number % 10) * 100_000 for number in range(400)]
    parquet.write_table(pyarrow.table({"text": texts}), path)
    table = read_table(path)

    assert isinstance(table.rows, ArrowRows)
    assert [row.fields["text"] for row in table.rows] == texts
