"""The run folder: what a run leaves behind, written so that nothing is lost on the way.

adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
config.yaml       every setting, as resolved, with the model and the rows
start.json        what was found before the first step
checkpoints/      the last and the best, see ``lorakit.training.checkpoint``
task.json         task, labels, lengths: what predicting needs
run.json          the summary
metrics.jsonl     what was planned, and a line per step, per validation and per warning
logs/             what trackers such as TensorBoard write, see ``lorakit.training.tracking``
chat_template.jinja   the base's, if it has one
tokenizer.json, tokenizer_config.json ...    the tokenizer, where it has more tokens than the base's own

The folder is there from the first step on. A run that it replaces lies in it, as ``.replaced``, until there is a
checkpoint or an adapter of the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lorakit.adapters import AdapterState
from lorakit.errors import RunFolderError, TrainingError
from lorakit.files import is_disk_full, umask, write_json, write_text
from lorakit.formats.peft import PeftFormat
from lorakit.formats.store import write_adapter
from lorakit.records import RunSummary, to_json
from lorakit.training.checkpoint import FOLDER as CHECKPOINTS
from lorakit.training.config import read_config, write_config
from lorakit.training.run_files import is_unfinished
from lorakit.training.spec import TaskSpec
from lorakit.training.start import Start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

OWN_FILES = ("run.json", "config.yaml", "adapter_config.json", "metrics.jsonl")
PARTS = (*OWN_FILES, "adapter_model.safetensors", "task.json", "chat_template.jinja", "start.json")
LOGS = "logs"
# What transformers writes of a tokenizer: a file of the tokenizers library, or the older kinds' own.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
REPLACED = ".replaced"


class RunFolder:
    """A run folder while its run lasts.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str | Path, force: bool = False) -> None:
        """Check the place; nothing is written yet, but a run that a killed process had set aside comes back.

        Raises:
            RunFolderError: it exists (and ``force`` is not set, or it is no run folder), or nothing can be made there.
        """
        self.path = Path(path).expanduser()
        self.force = force
        self._log: IO[str] | None = None
        self._lock: int | None = None
        self._begun = self._saved = False
        self._bring_back()
        self._check()

    @classmethod
    def to_go_on(cls, path: str | Path) -> RunFolder:
        """Open the folder of a run that was interrupted.

        Raises:
            RunFolderError: it is none, the run has ended, or another process is training it.
        """
        folder = cls.__new__(cls)
        folder.path, folder.force = Path(path).expanduser(), True
        folder._log = folder._lock = None
        folder._begun = folder._saved = False
        if not folder.path.is_dir():
            raise RunFolderError(f"there is no run folder '{folder.path}'.")
        if not (folder.path / "config.yaml").is_file():
            raise RunFolderError(f"'{folder.path}' has no config.yaml: it is not the folder of a run.")
        folder._lock = _locked(folder.path)
        return folder

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
            open_end = is_unfinished(self.path)
            hint = f", go on with it (lorakit resume {self.path})," if open_end else ","
            raise RunFolderError(
                f"run folder '{self.path}' exists already. Choose another --output{hint} or replace it with --force."
            )
        if not any((self.path / name).is_file() for name in OWN_FILES):
            raise RunFolderError(
                f"'{self.path}' is not a run folder, so even --force does not replace it. Choose another --output."
            )

    def begin(self, config: Mapping[str, Any], start: Start | None = None, tokenizer: Tokenizer | None = None) -> None:
        """Make the folder, keep a tokenizer with new tokens, start the metrics; an old run lies in it for a while.

        Raises:
            RunFolderError: meanwhile something else has been written there.
            TrainingError: the disk is full.
        """
        self._check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.new-", dir=self.path.parent))
        try:
            new.chmod(0o777 & ~umask())
            write_text(new / "config.yaml", write_config(config))
            (new / "metrics.jsonl").touch()
            if start is not None:
                write_json(new / "start.json", to_json(start))
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            if self.path.exists() and any(self.path.iterdir()):
                self.path.rename(new / REPLACED)
            # An empty folder gives way; between these two lines the old run is in a folder that is found again.
            os.replace(new, self.path)
        except BaseException:
            self._bring_back()
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._begun = True
        self._lock = _locked(self.path)
        self._log = (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def go_on(self, num_lines: int) -> list[dict[str, Any]]:
        """Go on after the first ``num_lines`` lines of metrics, which are returned; later ones are dropped.

        Raises:
            RunFolderError: there are fewer.
        """
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()[:num_lines] if file.is_file() else []
        if len(lines) < num_lines:
            raise RunFolderError(
                f"'{file}' has {len(lines):,} lines; {num_lines:,} were written before the checkpoint. Bring it back, "
                "or train anew with another --output."
            )
        write_text(file, "".join(f"{line}\n" for line in lines))
        (self.path / "run.json").unlink(missing_ok=True)  # of the interruption
        self._log = file.open("a", encoding="utf-8", buffering=1)
        return [json.loads(line) for line in lines]

    def change_config(self, **changes: Any) -> None:
        """Write down settings that have become others on the way."""
        write_text(self.path / "config.yaml", write_config({**read_config(self.path / "config.yaml"), **changes}))

    def write(self, name: str, record: Any) -> None:
        """Write a record as JSON."""
        write_json(self.path / name, to_json(record))

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

    def flush(self) -> None:
        """Write the metrics to the disk: no checkpoint may be ahead of them."""
        assert self._log is not None
        self._log.flush()
        os.fsync(self._log.fileno())

    def is_saved(self) -> None:
        """Let go of a replaced run: there is something to show of this one."""
        self._saved = True
        if (self.path / REPLACED).exists():
            shutil.rmtree(self.path / REPLACED, ignore_errors=True)

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
        self.is_saved()
        return self.path

    def finish(self, summary: RunSummary, chat_template: str | None) -> None:
        """Write the summary."""
        if chat_template:
            write_text(self.path / "chat_template.jinja", chat_template)
        write_json(self.path / "run.json", to_json(summary))
        self.end()

    def end(self) -> None:
        """Close the folder; where nothing was saved undo :meth:`begin`, so that a replaced run comes back."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of by :meth:`log`
                self._log.close()
            self._log = None
        if self._begun and not self._saved:
            for name in (*PARTS, *TOKENIZER):
                (self.path / name).unlink(missing_ok=True)
            for folder in (CHECKPOINTS, LOGS):
                shutil.rmtree(self.path / folder, ignore_errors=True)
            left = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
            if left == {REPLACED}:
                self.path.rename(self.path.with_name(f".{self.path.name}.new-back"))
                self._bring_back()
            elif not left and self.path.is_dir():
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._begun = False

    def _bring_back(self) -> None:
        """Mend what a process that was killed between two renames has left: the old run takes its place again."""
        if not self.path.parent.is_dir():
            return
        for aside in self.path.parent.glob(f".{self.path.name}.new-*"):
            if (aside / REPLACED).is_dir() and not self.path.exists():
                (aside / REPLACED).rename(self.path)
                shutil.rmtree(aside, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """Claim a run folder for this process as long as it lives, where the system can.

    Raises:
        RunFolderError: another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RunFolderError(f"another process is training '{folder}' now. Wait for it, or end it.") from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


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
