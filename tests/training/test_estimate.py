"""What a run was expected to take, beside what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.records import Planned, from_json
from lorakit.training import estimate
from lorakit.training.fit import FitResult
from lorakit.training.observe import About, Observer
from lorakit.training.run_files import read_start

Fit = Callable[..., FitResult]
SAME_MEMORY = 0.02
"""Between the simulated step and the real one: the accuracy that docs/plan.md states, and rounding of small tensors."""
CASES = {"bert": "classified", "llama": "prompted"}


def first_line(folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    folder = tmp_path_factory.mktemp("planned") / "run"
    return quick_fit(request.param, CASES[request.param], output=folder, max_steps=5)


@pytest.fixture
def planned(run: FitResult) -> Planned:
    assert run.folder is not None
    return from_json(Planned, first_line(run.folder))


def test_the_plan_is_the_first_line_of_the_metrics(run: FitResult) -> None:
    assert run.folder is not None
    line = first_line(run.folder)
    assert (line["kind"], line["step"], line["num_steps"]) == ("plan", 0, 5)


def test_the_start_keeps_the_plan_for_a_resumed_run(run: FitResult, planned: Planned) -> None:
    assert run.folder is not None
    start = read_start(run.folder)
    assert start is not None
    assert start.planned == planned


def test_the_planned_numbers_are_those_trained(run: FitResult, planned: Planned) -> None:
    assert planned.num_trainable == run.summary.num_trainable


def test_the_planned_memory_is_that_of_the_step(run: FitResult, planned: Planned) -> None:
    assert planned.above_weights == pytest.approx(run.summary.peak_memory_bytes, rel=SAME_MEMORY)


def test_the_planned_disk_is_the_file_without_its_header(run: FitResult, planned: Planned) -> None:
    assert planned.adapter_bytes is not None
    assert 0 < run.summary.adapter_bytes - planned.adapter_bytes < 2**14


def test_the_planned_time_is_from_a_real_pass(planned: Planned) -> None:
    assert planned.seconds is not None
    assert 0 < planned.seconds < 60
    assert planned.seconds_from.startswith("by the tokens of one real pass over the longest 8 rows")


def test_a_model_too_deep_to_simulate_quickly_says_so(
    quick_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "MOST_SIMULATED", 3)
    quick_fit(output=tmp_path / "run", max_steps=1)
    found = from_json(Planned, first_line(tmp_path / "run"))
    assert (found.memory, found.num_trainable) == (None, None)
    assert "take long to simulate" in found.left_out


class Sees(Observer):
    """Keeps what the run says of itself."""

    def begins(self, about: About) -> None:
        self.about = about


def test_who_watches_is_told_what_is_trained_on_what(quick_fit: Fit, tmp_path: Path) -> None:
    watch = Sees()
    summary = quick_fit(output=tmp_path / "run", max_steps=2, observer=watch).summary
    about = watch.about
    assert (about.num_base, about.num_trainable) == (summary.num_base, summary.num_trainable)
    assert (about.num_rows, about.num_steps, about.dtype) == (summary.num_train_rows, 2, "float32")
    assert about.folder == str(tmp_path / "run")


def test_a_run_without_a_folder_is_not_estimated(quick_fit: Fit) -> None:
    watch = Sees()
    quick_fit(max_steps=1, observer=watch)
    assert watch.about.planned is None


@pytest.mark.parametrize(
    ("seconds", "settings", "told"), [(1.0, {}, True), (1.0, {"cache_prefix": True}, False), (1e-6, {}, False)]
)
def test_a_long_run_is_told_of_compiling(
    seconds: float,
    settings: dict[str, Any],
    told: bool,
    quick_fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "seconds_per_token", lambda *given: seconds)
    notes: list[str] = []

    class Watch(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    more = {"layers": "last:1", "epochs": 2.0, "max_steps": None} if settings else {}
    given = {"max_steps": 12, **more, **settings}
    quick_fit("llama", "prompted", output=tmp_path / "run", observer=Watch(), **given)
    assert (estimate.COMPILE in notes) == told
