"""A folder written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.demos.replacing import check_replaceable, replacing
from lorakit.errors import RunFolderError

MARKER = "made.json"


def make(folder: Path, content: str = "old") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(content)


def write_and_stop(folder: Path, error: type[BaseException]) -> None:
    make(folder, "new")
    raise error


def test_an_earlier_folder_is_replaced_whole(tmp_path: Path) -> None:
    make(tmp_path / "run")
    (tmp_path / "run/more.txt").touch()
    with replacing(tmp_path / "run", MARKER) as fresh:
        (fresh / MARKER).write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", MARKER]
    assert (tmp_path / "run" / MARKER).read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "run")
    with pytest.raises(error), replacing(tmp_path / "run", MARKER) as fresh:
        write_and_stop(fresh, error)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", MARKER]
    assert (tmp_path / "run" / MARKER).read_text() == "old"


def test_an_error_removes_the_folders_that_were_made_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), replacing(tmp_path / "a/b/run", MARKER):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_the_folder_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()
    with replacing(tmp_path / "run", MARKER):
        pass
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "like").stat().st_mode


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RunFolderError, match=r"no made.json\), so it is not replaced"):
        check_replaceable(tmp_path, MARKER)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_way_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="Choose another --output"):
        check_replaceable(tmp_path / place, MARKER)
