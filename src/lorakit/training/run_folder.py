"""The run folder: what a run leaves behind, written so that nothing is lost on the way.

adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
config.yaml       every setting, as resolved
task.json         task, labels, lengths: what predicting needs
run.json          the summary
metrics.jsonl     a line per step and per validation
chat_template.jinja   the base's, if it has one
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lorakit.adapters import AdapterState
from lorakit.errors import RunFolderError, TrainingError
from lorakit.files import is_disk_full, write_json, write_text
from lorakit.formats.peft import PeftFormat
from lorakit.formats.store import write_adapter
from lorakit.records import RunSummary, from_json, to_json
from lorakit.training.config import write_config
from lorakit.training.spec import TaskSpec

OWN_FILES = ("run.json", "config.yaml", "adapter_config.json", "metrics.jsonl")
PARTS = (*OWN_FILES, "adapter_model.safetensors", "task.json", "chat_template.jinja")


class RunFolder:
    """A run folder while its run lasts.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str | Path, force: bool = False) -> None:
        """Check the place; nothing is written yet.

        Raises:
            RunFolderError: it exists (and ``force`` is not set, or it is no run folder), or nothing can be made there.
        """
        self.path = Path(path).expanduser()
        self.force = force
        self._old: Path | None = None
        self._log: IO[str] | None = None
        self._begun = self._saved = False
        self._check()

    def _check(self) -> None:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise RunFolderError(f"'{self.path}' is a file or a link, not a folder. Choose another --output.")
        place = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            problem = "may not be written to by this user" if place.is_dir() else "is a file, not a folder"
            raise RunFolderError(f"'{self.path}' cannot be made: '{place}' {problem}. Choose another --output.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.force:
            raise RunFolderError(
                f"run folder '{self.path}' exists already. Choose another --output, or replace it with --force."
            )
        if not any((self.path / name).is_file() for name in OWN_FILES):
            raise RunFolderError(
                f"'{self.path}' is not a run folder, so even --force does not replace it. Choose another --output."
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder and start its metrics; an old run is set aside until the new one is saved.

        Raises:
            RunFolderError: meanwhile something else has been written there.
            TrainingError: the disk is full.
        """
        self._check()
        if self.path.exists() and any(self.path.iterdir()):
            aside = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.old-", dir=self.path.parent)) / self.path.name
            self.path.rename(aside)
            self._old = aside
        self._begun = True
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", write_config(config))
        self._log = (self.path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line of metrics.

        Raises:
            TrainingError: the disk is full.
        """
        assert self._log is not None
        try:
            self._log.write(json.dumps(dict(line)) + "\n")
        except OSError as error:
            if is_disk_full(error):
                raise TrainingError(f"the disk is full: metrics could not be added in '{self.path}'.") from error
            raise

    def save_adapter(self, state: AdapterState, spec: TaskSpec, revision: str | None) -> Path:
        """Write the adapter and return the folder it is in.

        Where the disk is full, the adapter goes to the system's folder for temporary files instead, so
        that what was learned is not lost, and the error says where.

        Raises:
            TrainingError: the disk is full.
        """
        format = PeftFormat(spec.peft_task, revision)
        try:
            write_adapter(state, self.path, format, force=True)
            write_json(self.path / "task.json", to_json(spec))
        except TrainingError as error:
            rescue = _rescued(state, format)
            if rescue is None:
                raise
            raise TrainingError(f"{error} The adapter itself was saved whole in '{rescue}' instead.") from error
        self._saved = True
        return self.path

    def finish(self, summary: RunSummary, chat_template: str | None) -> None:
        """Write the summary and let go of the run that was replaced."""
        if chat_template:
            write_text(self.path / "chat_template.jinja", chat_template)
        write_json(self.path / "run.json", to_json(summary))
        self.end()

    def end(self) -> None:
        """Let go of a replaced run once the adapter is saved; without one undo :meth:`begin`, and it comes back."""
        self.close()
        if self._begun and not self._saved:
            for name in PARTS:
                (self.path / name).unlink(missing_ok=True)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
            if self._old is not None and not self.path.exists():
                self._old.rename(self.path)
        # What could not come back because something stands in its place stays where it was set aside.
        if self._old is not None and (self._saved or not self._old.exists()):
            shutil.rmtree(self._old.parent, ignore_errors=True)
        self._begun = False

    def close(self) -> None:
        """Close the metrics file."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of by :meth:`log`
                self._log.close()
            self._log = None


def _rescued(state: AdapterState, format: PeftFormat) -> Path | None:
    """Save an adapter in a new folder among the system's temporary files; None where that is full too."""
    rescue: Path | None = None
    try:
        rescue = Path(tempfile.mkdtemp(prefix="lorakit-rescued-"))
        write_adapter(state, rescue, format)
    except (TrainingError, OSError):
        if rescue is not None:
            shutil.rmtree(rescue, ignore_errors=True)
        return None
    return rescue


def read_summary(folder: str | Path) -> RunSummary:
    """Read ``run.json``.

    Raises:
        RunFolderError: it is missing or broken.
    """
    value = _read(Path(folder) / "run.json")
    try:
        return from_json(RunSummary, value)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"'{folder}/run.json' is not a run's summary ({error!r}).") from error


def read_spec(folder: str | Path) -> TaskSpec:
    """Read ``task.json``.

    Raises:
        RunFolderError: it is missing or broken.
    """
    value = _read(Path(folder) / "task.json")
    try:
        return from_json(TaskSpec, value)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"'{folder}/task.json' does not describe a task ({error!r}).") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RunFolderError(f"'{path.parent}' has no {path.name}: it is not a finished run folder.") from None
    except ValueError as error:
        raise RunFolderError(f"'{path}' is broken: {error}.") from None
