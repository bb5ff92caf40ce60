"""What was planned beside what was measured, for the terminal and the page."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lorakit.records import Planned, RunSummary, to_json
from lorakit.reports import costs
from lorakit.reports.html import render_report
from lorakit.reports.tables import summary_table

Run = tuple[RunSummary, list[dict[str, Any]]]

PLANNED = Planned(
    num_steps=150,
    num_trainable=740_360,
    adapter_bytes=2_961_440,
    memory={"weights": 90_852_864, "adapter": 2_961_440, "activations": 219_757_331, "gradients": 0},
    seconds=40.0,
    seconds_from="by the tokens of one real pass over the longest 16 rows",
)


def with_plan(run: Run, plan: Planned = PLANNED, **changes: Any) -> Run:
    line = {"kind": "plan", "step": 0, "loss": None, **to_json(plan)}
    return replace(run[0], spectra=(), **changes), [line, *run[1]]


def rows(run: Run) -> dict[str, tuple[str, str, str]]:
    return {row.name: (row.planned, row.measured, row.difference) for row in costs.cost_rows(*run)}


def test_each_planned_figure_stands_beside_the_measured_one(classification_run: Run) -> None:
    assert rows(with_plan(classification_run)) == {
        "numbers trained": ("740,360", "740,360", "exact"),
        "optimizer steps": ("150", "150", "exact"),
        "peak memory": ("212 MiB", "212 MiB", "exact"),
        "adapter on disk": ("2.82 MiB", "2.84 MiB", "+0.44 %"),
        "training time": ("40.0 s", "48.2 s", "+21 %"),
    }


def test_a_run_that_ended_early_is_compared_by_step_too(classification_run: Run) -> None:
    found = rows(with_plan(classification_run, num_steps=75, seconds=22.0, finished=False))
    assert found["optimizer steps"] == ("150", "75", "-50 %")
    assert found["time per step"] == ("0.267 s", "0.293 s", "+10 %")


def test_what_was_not_simulated_is_absent_and_says_why(classification_run: Run) -> None:
    run = with_plan(classification_run, Planned(150, left_out="its code asks for values", seconds=40.0))
    assert rows(run)["peak memory"] == ("n/a", "212 MiB", "")
    assert "No step was simulated: its code asks for values" in costs.plan_remark(run[1])
    assert costs.part_rows(run[1]) == []


def test_the_parts_of_the_memory_add_up_and_the_largest_is_first(classification_run: Run) -> None:
    parts = costs.part_rows(with_plan(classification_run)[1])
    assert [part.name for part in parts] == ["activations", "weights", "adapter"]
    assert sum(part.share for part in parts) == pytest.approx(1.0)


def test_a_run_without_a_plan_has_no_table_of_it(classification_run: Run) -> None:
    summary = replace(classification_run[0], spectra=())
    assert costs.cost_rows(summary, classification_run[1]) == []
    assert 'id="plan"' not in render_report(summary, classification_run[1][:3], "run")


def test_the_page_shows_the_plan_beside_the_cost(classification_run: Run) -> None:
    summary, metrics = with_plan(classification_run)
    page = render_report(summary, metrics[:3], "run")
    assert 'id="plan"' in page
    assert [text for row in costs.cost_rows(summary, metrics) for text in vars(row).values() if text not in page] == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_it_without_cutting_a_figure(classification_run: Run, width: int) -> None:
    summary, metrics = with_plan(classification_run)
    written = io.StringIO()
    Console(file=written, width=width).print(summary_table(summary, metrics))
    line = next(line for line in written.getvalue().splitlines() if line.strip().startswith("numbers trained"))
    assert line.split()[-3:] == ["740,360", "740,360", "exact"]
