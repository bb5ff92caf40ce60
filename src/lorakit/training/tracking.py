"""A run's metrics for TensorBoard, Weights & Biases and others, through accelerate's trackers.

A tracker gets the numbers of the lines that ``metrics.jsonl`` gets, at their steps: ``train/loss``, ``train/lr``,
``train/grad_norm``, ``train/tokens_per_s``, ``eval/loss`` and so on. What writes files does so below ``logs/`` in the
run folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError, bullet_list, did_you_mean, quoted
from lorakit.training.keeper import Keeper, Snapshot
from lorakit.training.run_folder import LOGS, RunFolder

PROJECT = "lorakit"
# Where the package is called otherwise than the tracker; 'lorakit[tracking]' brings TensorBoard.
_PACKAGES = {"tensorboard": "lorakit[tracking]", "comet_ml": "comet-ml"}
_LEFT_OUT = ("step", "seconds", "num_rows", "num_tokens")


def tracker_names(log_to: str | Sequence[str] | None) -> list[str]:
    """Return the trackers that a setting names, each once."""
    given = log_to.split(",") if isinstance(log_to, str) else list(log_to or ())
    return list(dict.fromkeys(name.strip() for name in given if name.strip()))


def check_trackers(log_to: str | Sequence[str] | None, output: str | None) -> None:
    """Refuse trackers that accelerate does not know, that are not installed, or that have no place for their files.

    Raises:
        ConfigError: every problem found.
    """
    names = tracker_names(log_to)
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    here = {str(name) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in known:
            problems.append(f"no tracker '{name}'.{did_you_mean(name, list(known))} Known: {quoted(sorted(known))}")
        elif name not in here:
            package = _PACKAGES.get(name, name)
            problems.append(f"'{name}' is not installed. Install it: pip install '{package}'")
        elif known[name].requires_logging_directory and output is None:
            problems.append(f"'{name}' writes files, and there is no run folder for them. Set output")
    if problems:
        raise ConfigError(f"log_to: {bullet_list(problems)}")


class TrackedKeeper(Keeper):
    """Passes everything on to another keeper, and the numbers of the lines to trackers as well."""

    def __init__(self, inner: Keeper, trackers: Sequence[Any]) -> None:
        self.inner, self.trackers = inner, trackers
        self.saves = inner.saves

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Return the other's."""
        return self.inner.opening()

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics."""
        self.inner.log(line)
        values = numbers(line)
        for tracker in self.trackers if values else ():
            tracker.log(values, step=line["step"])

    def save(self, snapshot: Snapshot) -> None:
        """Take a snapshot."""
        self.inner.save(snapshot)

    def backed_off(self, step: int) -> None:
        """Pass it on."""
        self.inner.backed_off(step)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a step's or an evaluation's line, by ``kind/name``.

    >>> numbers({"kind": "eval", "step": 8, "loss": 0.5, "accuracy": 0.9, "perplexity": None, "samples": []})
    {'eval/loss': 0.5, 'eval/accuracy': 0.9}
    """
    if line["kind"] not in ("train", "eval"):
        return {}
    return {
        f"{line['kind']}/{name}": float(value)
        for name, value in line.items()
        if name not in _LEFT_OUT and isinstance(value, int | float) and math.isfinite(value)
    }


@contextlib.contextmanager
def tracked(
    keeper: Keeper,
    log_to: str | Sequence[str] | None,
    folder: RunFolder | None,
    settings: Mapping[str, Any],
    snapshot: Snapshot | None,
) -> Iterator[Keeper]:
    """Start the trackers, and end them with the block; for the main process alone.

    Args:
        keeper: what keeps the run's metrics otherwise.
        log_to: names of trackers, checked before.
        folder: the run folder.
        settings: what a tracker without files of its own should know of the run.
        snapshot: where a resumed run goes on; its trackers go on after that step.
    """
    names = tracker_names(log_to)
    if not names:
        yield keeper
        return
    step = snapshot.progress.step if snapshot is not None else 0
    trackers = [_started(name, folder.path if folder is not None else None, settings, step) for name in names]
    try:
        yield TrackedKeeper(keeper, trackers)
    finally:
        for tracker in trackers:
            tracker.finish()


def _started(name: str, folder: Path | None, settings: Mapping[str, Any], step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's loggers, which the trackers use, ask it which process this is
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        assert folder is not None
        # TensorBoard leaves out what an interrupted run had written after the checkpoint that it goes on from.
        more = {"purge_step": step + 1} if name == "tensorboard" and step else {}
        (folder / LOGS).mkdir(exist_ok=True)
        tracker = kind(name, str(folder / LOGS), **more)
        tracker.start()
        return tracker
    tracker = kind(PROJECT)
    tracker.start()
    plain = {key: value if isinstance(value, int | float | None) else str(value) for key, value in settings.items()}
    tracker.store_init_configuration(plain)
    return tracker
