"""Writing files so that nothing a user made is lost: first whole beside the target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import TrainingError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` if the block ends without an error.

    A reader sees the old file or the new one, never a part. On an error the temporary file is removed
    and the old file stays as it was.

    Raises:
        TrainingError: the disk is full (named with the place).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise TrainingError(
                f"the disk is full: '{target}' could not be written. Nothing there was changed. Free some space."
            ) from error
        raise


def existing_part(path: str | os.PathLike[str]) -> Path:
    """Return as much of a path as is there already: its disk is the one that will be written to."""
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return place


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, of Python's or of safetensors' Rust code, says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "StorageFull" in str(error)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def take_name(fresh: Path, folder: Path) -> None:
    """Rename the folder ``fresh`` to ``folder``, beside it; what is there is put back if that fails, removed if not."""
    if not folder.exists():
        fresh.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
    old = aside / folder.name
    try:
        folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def umask() -> int:
    """Return the permission bits that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
