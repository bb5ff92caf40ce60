"""Files of examples: every kind that is read, and one clear message for every way they can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.training.data.read import read_splits, read_table, table_from_rows

ROWS = [{"text": "good café", "label": "a"}, {"text": "bad, really", "label": "b"}]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def numbered(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return [(row.number, row.fields) for row in read_table(path).rows]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines_are_numbered_by_line(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, f"rows{suffix}", jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[1:]))

    assert numbered(path) == [(1, ROWS[0]), (3, ROWS[1])]
    assert read_table(path).unit == "line"


def test_json_list_is_numbered_by_record(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.json", json.dumps(ROWS, indent=1))

    assert numbered(path) == [(1, ROWS[0]), (2, ROWS[1])]
    assert read_table(path).unit == "record"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_delimited_text_is_numbered_by_the_line_a_row_starts_in(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [["text", "label"], ["two\nlines; or, more\ttabs", "a"], ['quote " here', "b"]]
        )

    assert numbered(path) == [
        (2, {"text": "two\nlines; or, more\ttabs", "label": "a"}),
        (4, {"text": 'quote " here', "label": "b"}),
    ]


def test_parquet_is_numbered_by_record(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)

    assert numbered(path) == [(1, ROWS[0]), (2, ROWS[1])]
    assert read_table(path).unit == "record"


def test_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "book.txt", "\none\ntwo\r\n \n\nthree")

    assert numbered(path) == [(2, {"text": "one\ntwo"}), (6, {"text": "three"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    content = {"a.csv": "text\nhello\n", "a.txt": "hello"}.get(name, '{"text": "hello"}')
    path = written(tmp_path, name, b"\xef\xbb\xbf" + content.encode())

    assert read_table(path).rows[0].fields == {"text": "hello"}


def test_line_separators_inside_a_json_text_do_not_end_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", jsonl([{"text": "one\u2028two\x85three"}]))

    assert read_table(path).rows[0].fields["text"] == "one\u2028two\x85three"


def test_long_fields_of_csv_are_read_and_the_limit_of_python_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = written(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n")

    assert len(read_table(path).rows[0].fields["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_missing_file_is_told_with_the_closest_name(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", jsonl(ROWS))

    with pytest.raises(DataError, match=r"no file '.*trian\.jsonl'\. Closest: 'train\.jsonl'"):
        read_table(tmp_path / "trian.jsonl")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder '.*nowhere' does not exist"):
        read_table(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.xlsx", "x", r"ends in '\.xlsx'.*\.jsonl, .*\.parquet"),
        ("a", "x", "ends in ''"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y",}\n', r"a\.jsonl, line 2, column 14: "),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "line 2: a list, not an object"),
        ("a.jsonl", '"x"\n', "line 1: a text, not an object"),
        ("a.json", '[{"text": "x"},\n {"text": }]', "line 2, column 11"),
        ("a.json", '[{"text": "x"}, 5, null]', r"(?s)record 2: a number.*record 3: nothing"),
        ("a.json", '{\n"data": [{"text": "x"}]\n}', "holds an object.*lists under 'data'"),
        ("a.json", "3", "holds a number; a list of objects"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "not UTF-8: byte 0xe9 in line 2, byte 14"),
        ("a.csv", "text,label\nx,a\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", "text,label\nx,a\ny\nz,b,c\n", r"(?s)2 rows.*line 3: 1 fields.*line 4: 3 fields"),
        ("a.csv", 'text,label\nx,a\n"y,b\n', "line 3: unexpected end of data"),
        ("a.csv", "text,text\nx,a\n", "the name 'text' twice"),
        ("a.csv", "text,\nx,a\n", "a column without a name"),
        ("a.parquet", "PAR1 no", "not a whole Parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_table(written(tmp_path, name, content))


def test_eight_broken_lines_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "x"}\n' + "{broken\n" * 11)

    with pytest.raises(DataError) as caught:
        read_table(path)

    lines = str(caught.value).splitlines()
    assert "11 rows" in lines[0]
    assert sum(line.strip().startswith("- line") for line in lines) == 8
    assert "and 3 more" in lines[-2]


def test_a_file_is_the_train_split(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", jsonl(ROWS))

    assert read_splits(path) == {"train": read_table(path)}


def test_a_folder_gives_its_splits_under_one_name_each(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        written(tmp_path, name, jsonl(ROWS))
    written(tmp_path, "README.md", "about")

    assert sorted(read_splits(tmp_path)) == ["test", "train", "validation"]


def test_a_folder_without_a_train_file_is_refused_with_what_it_has(tmp_path: Path) -> None:
    written(tmp_path, "test.jsonl", jsonl(ROWS))

    with pytest.raises(DataError, match=r"no file named 'train'.*found 'test\.jsonl'"):
        read_splits(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "val.jsonl", "validation.jsonl"):
        written(tmp_path, name, jsonl(ROWS))

    with pytest.raises(DataError, match=r"several validation files: 'val\.jsonl', 'validation\.jsonl'"):
        read_splits(tmp_path)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)


def test_rows_in_memory_are_copied(tmp_path: Path) -> None:
    table = table_from_rows(iter(ROWS))

    assert [row.fields for row in table.rows] == ROWS
    assert table.rows[0].fields is not ROWS[0]
    assert (table.source, table.unit, table.columns) == ("rows", "record", ("text", "label"))


def test_a_dataset_gives_class_names_for_class_numbers() -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)

    assert [row.fields["label"] for row in table_from_rows(rows).rows] == ["good", "bad"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "there are no rows"),
        ([{"text": "x"}, "y"], "record 2: a text, not an object"),
        ("train.jsonl", "a list of dictionaries is needed, found str"),
        ({"text": ["x"]}, "a list of dictionaries is needed, found dict"),
    ],
)
def test_what_is_wrong_with_rows_in_memory_is_told(rows: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        table_from_rows(rows)


@pytest.mark.parametrize(
    ("place", "count"),
    [("trec/train.jsonl", 5444), ("e2e/test.jsonl", 4693), ("instruct/alpaca_en.json", 999)],
)
def test_real_files_are_read_whole(shared: Path, place: str, count: int) -> None:
    assert len(read_table(shared / "data" / place).rows) == count
