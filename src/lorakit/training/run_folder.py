"""The run folder: what a run leaves behind, written so that nothing is lost on the way.

    adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
    config.yaml       every setting, as resolved
    task.json         task, labels, lengths: what predicting needs
    run.json          the summary
    metrics.jsonl     a line per step and per validation
    chat_template.jinja   the base's, if it has one
"""

from __future__ import annotations

import json
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


class RunFolder:
    """A run folder while its run lasts.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str | Path, force: bool = False) -> None:
        """Check the place; nothing is written yet.

        Raises:
            RunFolderError: it exists (and ``force`` is not set, or it is no run folder).
        """
        self.path = Path(path).expanduser()
        self._old: Path | None = None
        self._log: IO[str] | None = None
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise RunFolderError(f"'{self.path}' is a file or a link, not a folder. Choose another --output.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not force:
            raise RunFolderError(
                f"run folder '{self.path}' exists already. Choose another --output, or replace it with --force."
            )
        if not any((self.path / name).is_file() for name in OWN_FILES):
            raise RunFolderError(
                f"'{self.path}' is not a run folder, so even --force does not replace it. Choose another --output."
            )

    def begin(self, config: Mapping[str, Any]) -> None:
        """Make the folder and start its metrics; an old run is set aside until the new one is saved."""
        if self.path.exists() and any(self.path.iterdir()):
            self._old = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.old-", dir=self.path.parent)) / self.path.name
            self.path.rename(self._old)
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
            rescue = Path(tempfile.mkdtemp(prefix="lorakit-rescued-"))
            try:
                write_adapter(state, rescue, format)
            except (TrainingError, OSError):
                shutil.rmtree(rescue, ignore_errors=True)
                raise error from None
            raise TrainingError(f"{error} The adapter itself was saved whole in '{rescue}' instead.") from error
        return self.path

    def finish(self, summary: RunSummary, chat_template: str | None) -> None:
        """Write the summary and let go of the run that was replaced."""
        if chat_template:
            write_text(self.path / "chat_template.jinja", chat_template)
        write_json(self.path / "run.json", to_json(summary))
        self.close()
        if self._old is not None:
            shutil.rmtree(self._old.parent, ignore_errors=True)
            self._old = None

    def abandon(self) -> None:
        """Undo :meth:`begin` where nothing was saved: a replaced run comes back."""
        self.close()
        saved = (self.path / "adapter_model.safetensors").is_file()
        if saved or not self.path.is_dir():
            return
        for name in ("config.yaml", "metrics.jsonl", "task.json"):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()
        if self._old is not None and not self.path.exists():
            self._old.rename(self.path)
            shutil.rmtree(self._old.parent, ignore_errors=True)

    def close(self) -> None:
        """Close the metrics file."""
        if self._log is not None:
            self._log.close()
            self._log = None


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
