"""Reading idx files: what was written comes back, and every kind of broken file is refused by name."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.demos.idx import read_idx
from lorakit.errors import DataError

from .conftest import idx_bytes, some_digits

PIXELS, LABELS = some_digits(20)
IMAGES_FILE, LABELS_FILE = idx_bytes(PIXELS), idx_bytes(LABELS)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_images_come_back_as_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(IMAGES_FILE) if name.endswith(".gz") else IMAGES_FILE)
    assert torch.equal(read_idx(file, 3), PIXELS)


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(gzip.compress(LABELS_FILE))
    assert torch.equal(read_idx(tmp_path / "labels", 1), LABELS)


def test_a_file_without_entries_is_an_empty_tensor(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(idx_bytes(PIXELS[:0]))
    assert read_idx(tmp_path / "images", 3).shape == (0, 28, 28)


def broken(change: Callable[[bytes], bytes]) -> bytes:
    return change(gzip.compress(IMAGES_FILE))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("images", b"\x89PNG\r\n\x1a\n" + IMAGES_FILE, "magic number 0x89504e47; .* has 0x00000803"),
        ("images", LABELS_FILE, "It is an idx file of labels"),
        ("images", idx_bytes(PIXELS, kind=0x0D), "magic number 0x00000d03"),
        ("images", IMAGES_FILE[:-1], "is cut off: .* 20 x 28 x 28 = 15,680 bytes and it holds only 15,679"),
        ("images", IMAGES_FILE[:9], "ends within its header"),
        ("images", IMAGES_FILE[:3], "ends before its header does"),
        ("images", b"", "nothing \\(it is empty\\)"),
        ("images", IMAGES_FILE + b"\0", "is too long"),
        ("images", idx_bytes(PIXELS[:0])[:4] + b"\xff" * 12 + bytes(9), "is cut off: .* holds only 9"),
        ("images.gz", IMAGES_FILE, "is not gzip, though its name ends in .gz: it begins with 0x0000"),
        ("images.gz", broken(lambda whole: whole[:-200]), "its gzip stream has no end"),
        ("images.gz", broken(lambda whole: whole[:40] + b"\xff\x00\xff" + whole[43:]), "is broken gzip"),
        ("images.gz", broken(lambda whole: whole[:-8] + bytes(4) + whole[-4:]), "is broken gzip"),
    ],
    ids=[
        "another kind of file", "labels", "floats", "cut off", "half a header", "half a magic", "empty", "too long",
        "a size beyond memory", "not gzip", "cut off gzip", "garbled gzip", "wrong checksum",
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as refused:
        read_idx(tmp_path / name, 3)
    assert f"'{tmp_path / name}'" in str(refused.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing-here' cannot be read: No such file"):
        read_idx(tmp_path / "nothing-here", 1)
