"""A folder written whole or not at all, in the place of an earlier one of the same kind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import RunFolderError, TrainingError
from lorakit.files import is_disk_full, take_name, umask


def check_replaceable(folder: Path, marker: str) -> None:
    """Refuse a place where a new folder cannot be written; call it before the work whose result goes there.

    Args:
        folder: the place.
        marker: a file that an earlier folder of the same kind has.

    Raises:
        RunFolderError: something else is there, or nothing can be made there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunFolderError(f"'{folder}' is a file or a link, not a folder. Choose another --output.")
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problem = "may not be written to by this user" if place.is_dir() else "is a file, not a folder"
        raise RunFolderError(f"'{folder}' cannot be made: '{place}' {problem}. Choose another --output.")
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise RunFolderError(
            f"'{folder}' holds something else than an earlier run of this demo (no {marker}), so it is not replaced. "
            "Choose another --output."
        )


@contextlib.contextmanager
def replacing(folder: Path, marker: str) -> Iterator[Path]:
    """Yield a new folder beside ``folder`` that takes its place if the block ends without an error.

    On an error the new folder is removed, the folders above it that were made for it too, and what was
    there stays as it was.

    Raises:
        RunFolderError: see :func:`check_replaceable`.
        TrainingError: the disk is full.
    """
    check_replaceable(folder, marker)
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~umask())
        take_name(fresh, folder)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: something else has come there meanwhile
                parent.rmdir()
        if is_disk_full(error):
            raise TrainingError(
                f"the disk is full: '{folder}' could not be written. Nothing there was changed. Free some space."
            ) from error
        raise
