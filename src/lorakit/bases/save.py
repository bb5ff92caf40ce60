"""Writing a base as a plain transformers folder: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.walk import ADAPTER_SEGMENT
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import RunFolderError, TrainingError
from lorakit.files import is_disk_full, take_name, umask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
) -> Path:
    """Write weights (safetensors), config, generation config and tokenizer to ``folder``.

    The base's weights are written as they stand: merge an adapter first. Tensors of adapters that are
    still attached are left out. Everything is written to a new folder beside ``folder`` that then takes
    its name; with ``force`` the model that was there is moved away first and removed last.

    Returns:
        The folder.

    Raises:
        RunFolderError: the folder exists (without ``force``), or is no model folder that may be replaced.
        TrainingError: the disk is full; what was there stays.
    """
    target = Path(folder).expanduser()
    check_free(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        _write(model, tokenizer, part)
        part.chmod(0o777 & ~umask())
        take_name(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if is_disk_full(error):
            raise TrainingError(
                f"the disk is full: the model could not be written to '{target}'. Nothing there was changed. "
                "Free some space."
            ) from error
        raise
    return target


def check_free(folder: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse a place that a model may not be written to; call it before the work whose result goes there.

    Raises:
        RunFolderError: something is there, and ``force`` is not given or would remove more than a model.
    """
    target = Path(folder).expanduser()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RunFolderError(f"'{target}' is a file or a link, not a folder. Give another place.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise RunFolderError(f"'{target}' exists already. Give another folder, or say --force to replace it.")
    if not (target / "config.json").is_file():
        raise RunFolderError(
            f"'{target}' is not a model folder (no config.json), so even --force does not replace it. "
            "Give another folder, or remove it yourself."
        )


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    state = model.state_dict()
    plain = {name: tensor for name, tensor in state.items() if ADAPTER_SEGMENT not in name.split(".")}
    with quiet_transformers():
        # Without adapters transformers gathers the state itself: it knows about offloaded weights.
        model.save_pretrained(folder, state_dict=plain if len(plain) < len(state) else None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask())  # safetensors writes for the owner alone
            with file.open("rb") as written:
                os.fsync(written.fileno())
