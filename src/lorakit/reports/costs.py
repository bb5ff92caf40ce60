"""What a run was expected to take beside what it took: rows for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.records import Planned, RunSummary, from_json
from lorakit.reports import wording


@dataclass(frozen=True)
class CostRow:
    """One cost: as planned, as measured, and by how much the measured one is off."""

    name: str
    planned: str
    measured: str
    difference: str


@dataclass(frozen=True)
class PartRow:
    """One part of the memory of a step as it was planned; ``share`` of all of it, in [0, 1]."""

    name: str
    size: str
    share: float


def planned(metrics: Sequence[Mapping[str, Any]]) -> Planned | None:
    """Return what the first lines of ``metrics.jsonl`` say of the plan; None where there is none."""
    found = (line for line in metrics if line["kind"] == "plan")
    return next((from_json(Planned, line) for line in found), None)


def cost_rows(summary: RunSummary, metrics: Sequence[Mapping[str, Any]]) -> list[CostRow]:
    """Hold each planned figure against the measured one; empty where nothing was planned."""
    plan = planned(metrics)
    if plan is None:
        return []
    whole: list[tuple[str, float | None, float | None, Callable[[Any], str]]] = [
        ("numbers trained", plan.num_trainable, summary.num_trainable, wording.count),
        ("optimizer steps", plan.num_steps, summary.num_steps, wording.count),
        ("peak memory", plan.above_weights, summary.peak_memory_bytes, wording.size),
        ("adapter on disk", plan.adapter_bytes, summary.adapter_bytes, wording.size),
        ("training time", plan.seconds, summary.seconds, wording.duration),
    ]
    if plan.seconds is not None and summary.num_steps not in (0, plan.num_steps):
        each = plan.seconds / plan.num_steps, summary.seconds / summary.num_steps
        whole.append(("time per step", *each, lambda value: f"{wording.significant(value)} s"))
    return [
        CostRow(name, wording.ABSENT if before is None else write(before), write(after), _difference(before, after))
        for name, before, after, write in whole
        if after is not None
    ]


def _difference(before: float | None, after: float) -> str:
    if before is None:
        return ""
    if before == after:
        return "exact"
    if before == 0:
        return wording.ABSENT
    share = 100 * (after / before - 1)
    return f"{share:+.2f} %" if abs(share) < 0.95 else f"{share:+.0f} %" if abs(share) >= 9.5 else f"{share:+.1f} %"


def part_rows(metrics: Sequence[Mapping[str, Any]]) -> list[PartRow]:
    """List what the planned memory of a step is for, the largest first; parts that are nothing are left out."""
    plan = planned(metrics)
    if plan is None or plan.memory is None:
        return []
    total = max(1, sum(plan.memory.values()))
    parts = sorted(plan.memory.items(), key=lambda part: -part[1])
    return [PartRow(name, wording.size(number), number / total) for name, number in parts if number]


def plan_remark(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Say where the planned figures are from, and why some are missing."""
    plan = planned(metrics)
    if plan is None:
        return ""
    memory = (
        "Planned before the first step: numbers, memory and disk by simulating a step without memory, as "
        "lorakit plan does"
        if plan.memory is not None
        else f"No step was simulated: {plan.left_out}"
    )
    time = f"time {plan.seconds_from}" if plan.seconds_from else "time not at all"
    return f"{memory}; {time}." if plan.memory is not None else f"{memory}. The {time}."
