"""Folders: splits, shards, compressed files, and what ``datasets`` saves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.training.data.read import read_splits, read_table

ROWS = [{"prompt": f"what {number}", "completion": "that"} for number in range(4)]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prompts(folder: Path) -> dict[str, list[str]]:
    return {split: [row.fields["prompt"] for row in table.rows] for split, table in read_splits(folder).items()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-00000-of-00002-0123456789abcdef.parquet", "train-00001-of-00002-0123456789abcdef.parquet"),
        ("train_1.jsonl", "train_2.jsonl"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        ("train/a.jsonl", "train/b.jsonl"),
    ],
)
def test_shards_are_put_together(tmp_path: Path, first: str, second: str) -> None:
    write(tmp_path / first, ROWS[:2])
    write(tmp_path / second, ROWS[2:])

    (table,) = read_splits(tmp_path).values()
    assert [row.fields for row in table.rows] == ROWS
    assert ([row.number for row in table.rows], table.unit) == ([1, 2, 3, 4], "record")
    assert table.source.endswith("(2 files)")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00003.parquet", ROWS)

    with pytest.raises(DataError, match=r"beside 'train-00000-of-00003\.parquet' shard 1, 2 is missing"):
        read_splits(tmp_path)


def test_shards_of_several_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-1.parquet", ROWS)
    write(tmp_path / "train-2.jsonl", ROWS)

    with pytest.raises(DataError, match=r"several kinds, '\.jsonl', '\.parquet'"):
        read_splits(tmp_path)


def test_splits_of_every_shape_stand_beside_each_other(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    write(tmp_path / "dev.jsonl", ROWS[1:2])
    write(tmp_path / "test" / "rows.jsonl", ROWS[2:])

    assert prompts(tmp_path) == {"train": ["what 0"], "validation": ["what 1"], "test": ["what 2", "what 3"]}


def test_a_file_and_a_folder_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train" / "a.jsonl", ROWS)

    with pytest.raises(DataError, match=r"several train files: 'train\.jsonl', 'train/a\.jsonl'"):
        read_splits(tmp_path)


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    import pyarrow

    plain = write(tmp_path / "rows.jsonl", ROWS).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(plain)

    assert [row.fields for row in read_table(tmp_path / "a.jsonl.gz").rows] == ROWS
    assert [row.fields for row in read_table(tmp_path / "b.jsonl.zst").rows] == ROWS


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz", "a.txt.gz"])
def test_every_kind_of_text_may_be_compressed(tmp_path: Path, name: str) -> None:
    content = {"a.csv.gz": "text\nhello\n", "a.json.gz": '[{"text": "hello"}]', "a.txt.gz": "hello\n"}[name]
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))

    assert [row.fields for row in read_table(tmp_path / name).rows] == [{"text": "hello"}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.jsonl.zst"])
def test_a_compressed_file_that_is_cut_is_told(tmp_path: Path, name: str) -> None:
    import pyarrow

    if name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(tmp_path / name), "zstd") as file:
            file.write(b'{"text": "x"}\n' * 5000)
        data = (tmp_path / name).read_bytes()
    else:
        data = gzip.compress(b'{"text": "x"}\n' * 5000)
    (tmp_path / name).write_bytes(data[: len(data) // 2])

    with pytest.raises(DataError, match="is not a whole compressed file"):
        read_table(tmp_path / name)


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": row["prompt"], "label": i % 2} for i, row in enumerate(ROWS)])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([3, 1])}).save_to_disk(tmp_path / "two")

    (one,) = read_splits(tmp_path / "one").values()
    two = read_splits(tmp_path / "two")
    assert [row.fields["label"] for row in one.rows] == ["bad", "good", "bad", "good"]
    assert [row.fields["text"] for row in two["validation"].rows] == ["what 3", "what 1"]


def test_saved_splits_without_one_for_training_are_refused(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train_sft": rows, "test": rows}).save_to_disk(tmp_path / "set")

    with pytest.raises(DataError, match=r"no split named 'train', but 'train_sft', 'test'\. Say one"):
        read_splits(tmp_path / "set")


@pytest.mark.parametrize("kind", ["new_file", "new_stream"])
def test_arrow_files_are_read(tmp_path: Path, kind: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with getattr(pyarrow.ipc, kind)(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)

    assert [row.fields for row in read_table(tmp_path / "rows.arrow").rows] == ROWS


def test_what_is_no_arrow_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.arrow").write_text("hello, this is text")

    with pytest.raises(DataError, match="is not a whole Arrow file"):
        read_table(tmp_path / "rows.arrow")
