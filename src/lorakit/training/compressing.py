"""A run's adapter, cut to fewer numbers, as a folder that is used like the run's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorakit.compose.compress import Compressed, compress
from lorakit.compose.selection import Selection
from lorakit.errors import RunFolderError, TrainingError
from lorakit.files import is_disk_full, take_name, umask, write_json, write_text
from lorakit.formats.peft import CONFIG, TENSORS, PeftFormat
from lorakit.formats.store import read_adapter, write_adapter
from lorakit.records import to_json
from lorakit.training.config import read_config, write_config
from lorakit.training.run_folder import TOKENIZER
from lorakit.training.runs import check_adapter_folder, tokenizer_folder

RECORD = "compressed.json"
# What using a run reads beside the adapter (and a tokenizer with new tokens), and of its settings those of its base.
_COPIED = ("task.json", "chat_template.jinja")
_KEPT_SETTINGS = ("dtype", "seed", "revision")


@dataclass(frozen=True)
class CompressedRun:
    """What compressing a run gave.

    Attributes:
        source: the run's folder; ``output`` the new one.
        bytes_before, bytes_after: size of the adapter's file.
        found: the adapter and its figures.
    """

    source: str
    output: str
    bytes_before: int
    bytes_after: int
    found: Compressed


def compress_run(run: str | Path, output: str | Path, selection: Selection) -> CompressedRun:
    """Cut a saved adapter and write it into a new folder, with what a run's folder has for using it.

    Args:
        run: a run folder, or a folder with a PEFT adapter.
        output: the new folder; there must be nothing yet.
        selection: what is kept.

    Raises:
        RunFolderError: there is no run, or something is at the output already.
        UnsupportedLayerError, InputError, ConfigError: see :func:`lorakit.compose.compress.compress`.
        TrainingError: the disk is full; nothing is left of the output.
    """
    source, target = Path(run).expanduser(), Path(output).expanduser()
    check_adapter_folder(source)
    _check_free(target)
    found = compress(read_adapter(source), selection)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        _write(found, source, fresh)
        report = CompressedRun(
            source=str(run),
            output=str(output),
            bytes_before=(source / TENSORS).stat().st_size,
            bytes_after=(fresh / TENSORS).stat().st_size,
            found=found,
        )
        write_json(fresh / RECORD, as_json(report) | {"selection": {type(selection).__name__: selection.model_dump()}})
        fresh.chmod(0o777 & ~umask())
        take_name(fresh, target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if is_disk_full(error):
            raise TrainingError(f"the disk is full: '{target}' could not be written. Free some space.") from error
        raise
    return report


def as_json(report: CompressedRun) -> dict[str, object]:
    """Return the figures as JSON values, without the adapter's tensors."""
    found = report.found
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "found"}
    return {
        **values,
        "method": found.state.method.summary(),
        "numbers_before": sum(cut.numbers_before for cut in found.layers),
        "numbers_after": sum(cut.numbers_after for cut in found.layers),
        "energy_kept": found.energy_kept,
        "predicted_error": found.predicted_error,
        "measured_error": found.measured_error,
        "notes": list(found.notes),
        "layers": to_json(found.layers),
    }


def _check_free(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise RunFolderError(f"'{target}' exists already; nothing is ever replaced here. Choose another --output.")


def _write(found: Compressed, source: Path, fresh: Path) -> None:
    saved = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    write_adapter(found.state, fresh, PeftFormat(saved.get("task_type"), saved.get("revision")))
    beside = [source / name for name in _COPIED]
    if (tokenizer := tokenizer_folder(source)) is not None:
        beside += [tokenizer / name for name in TOKENIZER]
    for file in beside:
        if file.is_file():
            shutil.copyfile(file, fresh / file.name)
    if (source / "config.yaml").is_file():
        settings = read_config(source / "config.yaml")
        kept = {name: settings[name] for name in _KEPT_SETTINGS if name in settings}
        write_text(fresh / "config.yaml", write_config(kept))
