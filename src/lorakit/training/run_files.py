"""Reading what a run folder says of its run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TypeVar

from lorakit.errors import RunFolderError
from lorakit.records import RunSummary, from_json
from lorakit.training.spec import TaskSpec
from lorakit.training.start import Start

R = TypeVar("R")


def read_summary(folder: str | Path) -> RunSummary:
    """Read ``run.json``.

    Raises:
        RunFolderError: it is missing or broken.
    """
    return _record(RunSummary, folder, "run.json", "is not a run's summary")


def read_start(folder: str | Path) -> Start | None:
    """Read ``start.json``; None where it is missing or broken."""
    with contextlib.suppress(RunFolderError, KeyError, TypeError, AttributeError):
        return from_json(Start, _read(Path(folder) / "start.json"))
    return None


def read_spec(folder: str | Path) -> TaskSpec:
    """Read ``task.json``.

    Raises:
        RunFolderError: it is missing or broken.
    """
    return _record(TaskSpec, folder, "task.json", "does not describe a task")


def _record(kind: type[R], folder: str | Path, name: str, problem: str) -> R:
    value = _read(Path(folder) / name)
    try:
        return from_json(kind, value)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"'{folder}/{name}' {problem} ({error!r}).") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RunFolderError(f"'{path.parent}' has no {path.name}: it is not a finished run folder.") from None
    except ValueError as error:
        raise RunFolderError(f"'{path}' is broken: {error}.") from None


def is_unfinished(folder: Path) -> bool:
    """Tell whether a run was begun here and has not come to its end."""
    if not (folder / "config.yaml").is_file():
        return False
    with contextlib.suppress(RunFolderError):
        return not read_summary(folder).finished
    return not (folder / "run.json").exists() and (folder / "start.json").is_file()


def check_unfinished(folder: Path) -> None:
    """Refuse to go on with what is no run, or has come to its end.

    Raises:
        RunFolderError: there is nothing to go on with.
    """
    from lorakit.errors import did_you_mean

    if not folder.is_dir():
        beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise RunFolderError(f"there is no run folder '{folder}'.{did_you_mean(folder.name, beside)}")
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(
            f"'{folder}' has no config.yaml: it is not the folder of a run. Give the --output of `lorakit train`."
        )
    if (folder / "run.json").is_file():
        summary = read_summary(folder)
        if summary.finished:
            raise RunFolderError(
                f"the run in '{folder}' has come to its end after {summary.num_steps:,} steps: there is nothing to go "
                "on with. To train longer, train anew with more --epochs and another --output."
            )
