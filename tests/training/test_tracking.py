"""A run's metrics in TensorBoard, through accelerate, read back from its event files."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.training.fit import FitResult, fit, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.tracking import check_trackers, tracker_names

Fit = Callable[..., FitResult]

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
# TensorBoard's own packages, when they are first imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
    pytest.mark.filterwarnings("ignore:.*google._upb.*:DeprecationWarning"),
]


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars of a run as (step, value), by their names."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "logs" / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]


@needs_tensorboard
def test_tensorboard_has_the_numbers_of_the_metrics_at_their_steps(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit(output=tmp_path / "run", max_steps=6, eval_every=3, log_to="tensorboard")
    found = events(tmp_path / "run")
    expected = {
        f"{kind}/{name}": [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(tmp_path / "run", kind)
        ]
        for kind, names in (
            ("train", ("loss", "lr", "grad_norm", "tokens_per_s", "epoch")),
            ("eval", ("loss", "accuracy", "macro_f1", "epoch")),
        )
        for name in names
    }  # events hold fp32
    assert found == expected


class PressesCtrlC(Observer):
    """Presses Ctrl-C in the third step."""

    def step(self, step: Step) -> None:
        if step.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


@needs_tensorboard
def test_a_resumed_run_goes_on_at_its_step(
    bases: Callable[[str], Path], rows_of: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of("classified")), encoding="utf-8")
    settings = {"max_steps": 6, "batch_size": 8, "log_to": ["tensorboard"], "output": tmp_path / "run"}
    fit(bases("bert"), rows, observer=PressesCtrlC(), **settings)
    resume(tmp_path / "run")
    assert [step for step, _ in events(tmp_path / "run")["train/loss"]] == [1, 2, 3, 4, 5, 6]


@needs_tensorboard
def test_a_run_that_breaks_before_its_first_step_leaves_no_logs(quick_fit: Fit, tmp_path: Path) -> None:
    class Breaks(Observer):
        def step(self, step: Step) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        quick_fit(output=tmp_path / "run", log_to="tensorboard", observer=Breaks())
    assert not (tmp_path / "run").exists()


def test_a_run_without_trackers_has_no_logs(quick_fit: Fit, tmp_path: Path) -> None:
    quick_fit(output=tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run" / "logs").exists()


def test_every_wrong_tracker_is_named_before_the_rows_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)no tracker 'tensorbord'\. Closest: 'tensorboard'.*no tracker 'nothing'"
    ):
        fit("no-model", tmp_path / "no-rows.jsonl", log_to="tensorbord,nothing")


@pytest.mark.skipif(importlib.util.find_spec("aim") is not None, reason="aim is installed")
def test_a_tracker_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"'aim' is not installed\. Install it: pip install 'aim'"):
        check_trackers("aim", "runs/mine")


@needs_tensorboard
def test_a_tracker_with_files_needs_a_run_folder() -> None:
    with pytest.raises(ConfigError, match="no run folder for them"):
        check_trackers(["tensorboard"], None)


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, []), ("", []), ("wandb", ["wandb"]), ("a, b,a", ["a", "b"]), (["a", "b", "b"], ["a", "b"])],
)
def test_trackers_are_named_by_text_or_list(given: Any, names: list[str]) -> None:
    assert tracker_names(given) == names
