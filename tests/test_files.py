"""Writing whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import TrainingError
from lorakit.files import atomic_write, is_disk_full, write_json, write_text


def test_the_file_has_the_text_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "grün\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "grün\n".encode()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_json_is_indented_with_letters_as_they_are(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "grün", "list": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "name": "grün",')
    assert text.endswith("}\n")
    assert json.loads(text) == {"name": "grün", "list": [1, None]}


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_an_error_inside_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "a.txt", "old")

    def write_and_fail() -> None:
        with atomic_write(tmp_path / "a.txt") as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_and_fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert part.parent == tmp_path
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TrainingError, match=r"the disk is full: '.*a\.txt' could not be written.*Free some space"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_really_full_device_is_recognised() -> None:
    with pytest.raises(OSError, match="No space") as caught, Path("/dev/full").open("w", buffering=1) as full:
        full.write("text\n")
    assert is_disk_full(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("full of errors")])
def test_other_errors_are_not_taken_for_a_full_disk(error: BaseException) -> None:
    assert not is_disk_full(error)
