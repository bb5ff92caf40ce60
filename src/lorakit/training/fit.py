"""``fit``: fine-tune a pretrained model on rows, prove what happened, and leave a run folder; ``resume``: go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.errors import ConfigError, InputError
from lorakit.training.config import RunConfig, TrainConfig, read_config
from lorakit.training.observe import Observer
from lorakit.training.prepare import Rows, prepare
from lorakit.training.processes import Processes, joined
from lorakit.training.run_files import check_unfinished
from lorakit.training.run_folder import RunFolder
from lorakit.training.session import FitResult, Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FitResult", "fit", "resume"]

_SOURCES = ("model", "data")


def fit(
    model: str | Path | nn.Module,
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    observer: Observer | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> FitResult:
    """Fine-tune ``model`` on ``rows``.

    Args:
        model: a folder or hub name, or a transformers model (adapted in place; then give its tokenizer).
        rows: a file or folder of examples, or dictionaries: ``text`` and ``label``, ``prompt`` and
            ``completion``, ``instruction`` and ``output``, ``messages``, or ``text``.
        tokenizer: the tokenizer of a model object.
        observer: is told how the run goes.
        config: settings as a value or a mapping, such as a run's ``config.yaml`` (whose model and rows are left aside:
            they are given here); ``settings`` says more of them by keyword. See :class:`TrainConfig`; what nobody sets
            is chosen, and the summary says why.
        settings: settings by keyword, such as ``rank=16`` or ``output="runs/mine"``.

    Returns:
        The adapted model with its summary; with ``output`` also a run folder. Where a launcher has started several
        processes, the same in each; the main one alone has the folder.

    Raises:
        InputError: something asked for cannot be done; nothing has been written then.
        TrainingError: the run broke, or the disk is full.
        KeyboardInterrupt: a second Ctrl-C; :func:`resume` goes on from the last checkpoint.

    After an error a model object that was given is as before, without the adapter.
    """
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else dict(config or {})
    given = {name: value for name, value in given.items() if name not in _SOURCES}
    twice = sorted(set(given) & set(settings)) if not isinstance(config, TrainConfig) else []
    if twice:
        raise ConfigError(f"set twice, in config and by keyword: {', '.join(twice)}.")
    decided = TrainConfig(**{**given, **settings})
    with joined(decided.device) as processes:
        watcher = _watcher(observer, processes)
        folder = RunFolder(decided.output, decided.force) if decided.output is not None and processes.main else None
        prepared = prepare(model, rows, decided, tokenizer, watcher)
        return Session(prepared, decided, watcher, folder, processes).begin(model, rows)


def resume(
    folder: str | Path,
    *,
    model: str | Path | nn.Module | None = None,
    rows: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    observer: Observer | None = None,
) -> FitResult:
    """Go on with an interrupted run from its last whole checkpoint; the result is that of the whole run.

    On a CPU with as many threads every loss and every number of the adapter is the same, bit for bit. A run that was
    ended before its first checkpoint starts again.

    Args:
        folder: the run folder.
        model: the base, where it was given as an object, or has moved.
        rows: the examples, where they were given as objects, or have moved.
        tokenizer: the tokenizer of a model object.
        observer: is told how the run goes.

    Raises:
        RunFolderError: there is no run, it has ended, another process is training it, or settings, rows or base are
            not those it was begun with.
    """
    place = Path(folder).expanduser()
    check_unfinished(place)
    config = RunConfig(**{**read_config(place / "config.yaml"), "output": str(place)})
    base, examples = model if model is not None else config.model, rows if rows is not None else config.data
    missing = [name for name, value in (("model", base), ("rows", examples)) if value is None]
    if missing:
        raise InputError(
            f"run '{place}' was begun with {' and '.join(missing)} given as objects, which no file holds. Go on with "
            f"lorakit.training.fit.resume('{place}', {', '.join(f'{name}=...' for name in missing)})."
        )
    assert base is not None
    assert examples is not None
    own = {"device": "auto", "dtype": "auto", "revision": None} if isinstance(base, nn.Module) else {}
    settings = TrainConfig(**{**config.model_dump(exclude=set(_SOURCES)), **own})
    with joined(settings.device) as processes:
        watcher = _watcher(observer, processes)
        opened = RunFolder.to_go_on(place) if processes.main else None
        try:
            prepared = prepare(base, examples, settings, tokenizer, watcher)
        except InputError as error:
            if opened is not None:
                opened.end()
            raise type(error)(f"run '{place}' cannot go on: {error}") from error
        return Session(prepared, settings, watcher, opened, processes).resume(place, base, examples)


def _watcher(observer: Observer | None, processes: Processes) -> Observer:
    return observer if observer is not None and processes.main else Observer()
