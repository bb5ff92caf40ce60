"""Checkpoints: a run at one moment, on disk, whole or recognisably not.

    RUN/checkpoints/step-000120/
        adapter_config.json, adapter_model.safetensors, task.json    the adapter, usable like a run folder
        state.safetensors    what the optimizer, the random generators and the method remember
        state.json           step, place in the rows, best so far, settings, and size and sha256 of the other files

A checkpoint is made under another name, flushed to the disk and then renamed; ``state.json`` is written last. Reading
checks every hash, so that what a killed writer or a failing disk has left is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters import AdapterState
from lorakit.errors import FormatError, LorakitError, RunFolderError, TrainingError, bullet_list
from lorakit.files import atomic_write, is_disk_full, umask, write_json
from lorakit.formats.peft import PeftFormat
from lorakit.formats.store import read_adapter, write_adapter
from lorakit.formats.tensors import TensorFile, read_tensors, write_tensors
from lorakit.records import from_json, to_json
from lorakit.training.keeper import Snapshot
from lorakit.training.plan import Progress
from lorakit.training.spec import TaskSpec

FOLDER = "checkpoints"
STATE, TENSORS = "state.json", "state.safetensors"
VERSION = 1
_NAME = re.compile(r"step-(\d+)(-unmeasured)?")


@dataclass(frozen=True)
class Facts:
    """What a run is a run of: a checkpoint goes on only where all of it is the same.

    Attributes:
        settings: the resolved settings that decide the numbers.
        rows: hash of the encoded rows; ``identity`` of the base.
        processes: how many train together.
    """

    settings: Mapping[str, Any]
    rows: str
    identity: str
    processes: int = 1

    def differences(self, other: Facts) -> list[str]:
        """Say how a checkpoint's facts, ``other``, differ from these."""
        found = []
        if self.rows != other.rows:
            found.append("the rows are others: the file of examples, or the tokenizer, has changed since")
        if self.identity != other.identity:
            found.append(f"the base is another one: {other.identity} then, {self.identity} now")
        if self.processes != other.processes:
            found.append(f"{other.processes} processes trained it, {self.processes} would go on")
        for name in sorted({*self.settings, *other.settings}):
            then, now = other.settings.get(name), self.settings.get(name)
            if then != now:
                found.append(f"{name} was {then!r} and is {now!r} in config.yaml now")
        return found


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: where they are.
        keep: how many of the last are kept, beside the best.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder, self.keep = run / FOLDER, keep

    def write(
        self, snapshot: Snapshot, facts: Facts, spec: TaskSpec, revision: str | None, base_name: str | None
    ) -> Path:
        """Write a snapshot, then let go of older ones; return its folder.

        Raises:
            TrainingError: the disk is full; the checkpoints that were there are still whole.
        """
        progress = snapshot.progress
        target = self.folder / name_of(progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=self.folder))
        try:
            state = dataclasses.replace(snapshot.adapter, base_name=base_name)
            write_adapter(state, part, PeftFormat(spec.peft_task, revision))
            write_json(part / "task.json", to_json(spec))
            with atomic_write(part / TENSORS) as temporary:
                write_tensors(temporary, TensorFile(snapshot.tensors))
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in sorted(part.iterdir())
            }
            content = {
                "version": VERSION,
                "progress": to_json(progress),
                "facts": to_json(facts),
                "scaler": dict(snapshot.scaler),
                "files": files,
            }
            write_json(part / STATE, content)
            part.chmod(0o777 & ~umask())
            _flush(part)
            if target.exists():  # broken, since the run has come here again
                shutil.rmtree(target)
            part.rename(target)
            _flush(self.folder)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            full = error.__cause__ if isinstance(error, TrainingError) and error.__cause__ else error
            if is_disk_full(full):
                raise TrainingError(
                    f"the disk is full: the checkpoint of step {progress.step:,} could not be written in "
                    f"'{self.folder}'. Earlier ones are whole."
                ) from full
            raise
        self.prune(progress)
        return target

    def prune(self, progress: Progress) -> None:
        """Remove all but the last ``keep`` checkpoints, the best one known to each, and what killed writers left."""
        until_now = [name for name in self.names() if _place(name) <= _place(name_of(progress))]
        last = until_now[: self.keep]
        kept = {*last, *(best for name in last if (best := self._best_beside(name)) is not None)}
        for entry in self.folder.iterdir():
            if entry.name.startswith(".step-") or (_NAME.fullmatch(entry.name) and entry.name not in kept):
                (entry / STATE).unlink(missing_ok=True)  # half removed, it is no checkpoint any more
                shutil.rmtree(entry, ignore_errors=True)

    def _best_beside(self, name: str) -> str | None:
        """Return the name of the checkpoint that holds the best adapter known to another one."""
        try:
            content = json.loads((self.folder / name / STATE).read_text(encoding="utf-8"))
            return f"step-{content['progress']['best_step']:06d}"
        except (OSError, ValueError, KeyError, TypeError):  # not whole: latest() says so when it is needed
            return None

    def names(self) -> list[str]:
        """Return the names of the checkpoints' folders, the latest first."""
        found = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((name for name in found if _NAME.fullmatch(name)), key=_place, reverse=True)

    def latest(self, facts: Facts) -> tuple[Snapshot | None, list[str]]:
        """Return the last whole checkpoint, and a note for each that was passed over; None if there is none.

        Raises:
            RunFolderError: the checkpoint is of other settings, rows, another base or number of processes.
        """
        notes = []
        for name in self.names():
            folder = self.folder / name
            try:
                content = _verified(folder)
                progress = from_json(Progress, content["progress"])
                best = self.folder / f"step-{progress.best_step:06d}"
                if progress.best_measure is not None and best != folder:
                    _verified(best)
                differences = facts.differences(from_json(Facts, content["facts"]))
                if differences:
                    raise RunFolderError(
                        f"'{folder}' cannot go on: {bullet_list(differences)}. Undo the change, or train anew with "
                        "another --output."
                    )
                tensors = read_tensors(folder / TENSORS).tensors
                adapter = read_adapter(folder)
            except (FormatError, KeyError, TypeError) as error:
                notes.append(f"Checkpoint '{name}' is passed over: {error}.".replace("..", "."))
                continue
            found = _best(progress, folder, best, adapter)
            return Snapshot(progress, adapter, tensors, content["scaler"], found), notes
        return None, notes


def name_of(progress: Progress) -> str:
    """Return the name of a checkpoint's folder; one before its step's evaluation has another than one after it."""
    return f"step-{progress.step:06d}" + ("-unmeasured" if progress.unmeasured else "")


def _best(progress: Progress, folder: Path, best: Path, adapter: AdapterState) -> AdapterState | None:
    if progress.best_measure is None:
        return None
    return adapter if best == folder else read_adapter(best)


def _place(name: str) -> tuple[int, bool]:
    match = _NAME.fullmatch(name)
    return (int(match[1]), match[2] is None) if match else (-1, False)


def _verified(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's ``state.json`` if all its files are what it says.

    Raises:
        FormatError: it is not whole.
    """
    try:
        content: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise FormatError(f"its version is {content['version']}, this lorakit writes {VERSION}")
        files = dict(content["files"])
    except FileNotFoundError:
        raise FormatError(f"it has no {STATE}, so that its writer has not come to the end") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"its {STATE} cannot be read ({error})") from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise FormatError(f"it lacks {name}")
        if file.stat().st_size != expected["bytes"] or _hash(file) != expected["sha256"]:
            raise FormatError(f"its {name} is not what was written")
    return content


def _hash(file: Path) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(2**20):
            whole.update(chunk)
    return whole.hexdigest()


def _flush(folder: Path) -> None:
    """Write a folder's list of files to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_progress(folder: Path) -> Progress | None:
    """Return how far the last whole checkpoint of a run has come; None if there is none."""
    for name in Checkpoints(folder).names():
        with contextlib.suppress(LorakitError, KeyError, TypeError):
            return from_json(Progress, _verified(folder / FOLDER / name)["progress"])
    return None
