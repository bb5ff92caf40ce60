"""What the runs of the methods gave, as figures, tables and pictures; nothing here trains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.gate_results import number
from experiments.method_runs import Result, Task

# Student's t of a two-sided 95 % interval by degrees of freedom; for more than these the normal's 1.96 is near.
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
BEGIN, END = "<!-- results: begin, written by experiments/run_methods.py -->", "<!-- results: end -->"

ALL_BROKEN = "every rate broke off"


@dataclass(frozen=True)
class Scored:
    """One candidate on one task, at the rate that its first seed chose.

    Attributes:
        name: the candidate's.
        lr: the rate; ``at_edge`` whether no smaller, or no larger, one was tried.
        results: one per seed.
        within: whether its numbers are within the budget; None of an anchor.
        remark: what a reader must know.
    """

    name: str
    lr: float
    at_edge: str
    results: tuple[Result, ...]
    within: bool | None
    remark: str = ""

    @property
    def scores(self) -> list[float]:
        """The test scores of the runs that ended."""
        return [result.test for result in self.results if result.test is not None]

    @property
    def mean(self) -> float:
        """The mean score; NaN where no run ended."""
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN of fewer than two seeds."""
        return statistics.stdev(self.scores) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else math.nan


def best_rate(task: Task, by_rate: Mapping[float, Result]) -> tuple[float, str]:
    """Return the rate with the best score on the held-out rows, and at which edge of the grid it lies, if at one."""
    sign = -1.0 if task.higher_is_better else 1.0
    ended = {lr: sign * result.held for lr, result in by_rate.items() if result.held is not None and _finite(result)}
    if not ended:
        return min(by_rate), ALL_BROKEN
    lr = min(ended, key=lambda lr: (ended[lr], lr))
    edge = {min(by_rate): "lowest rate of the grid", max(by_rate): "highest rate of the grid"}
    return lr, edge.get(lr, "")


def _finite(result: Result) -> bool:
    return result.held is not None and math.isfinite(result.held)


def against(task: Task, one: Scored, lora: Scored) -> str:
    """Say whether a candidate is better than plain LoRA: where the difference's 95 % interval does not hold 0."""
    if one.name == lora.name:
        return ""
    gain = (one.mean - lora.mean) * (1.0 if task.higher_is_better else -1.0)
    freedom = len(one.scores) + len(lora.scores) - 2
    noise = STUDENT_95.get(freedom, 1.96) * math.hypot(one.error, lora.error)
    if math.isnan(gain) or math.isnan(noise):
        return "not known"
    if abs(gain) <= noise:
        return "no difference"
    return "better" if gain > 0 else "worse"


def table(task: Task, scored: Sequence[Scored], budget: int) -> str:
    """Return a task's results as Markdown: first those at the budget, best first, then the others."""
    lora = next(one for one in scored if one.name == "lora")
    unit = "accuracy, %" if task.score == "accuracy" else "perplexity"
    arrow = "higher" if task.higher_is_better else "lower"
    lines = [
        f"### {task.title}",
        "",
        f"{task.steps} steps of {task.batch_size} rows, {task.num_test} test rows, {len(lora.results)} seeds; {arrow}"
        f" is better. Budget: {budget:,} numbers (LoRA of rank 8). Against LoRA: the difference's 95 % interval.",
        "",
        f"| | {unit}: mean (seeds) | against LoRA | trained | rate | seconds | peak MiB | file KiB | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = (("at the budget", True), ("not at the budget", False), ("for orientation", None))
    for title, within in groups:
        group = [one for one in scored if one.within is within]
        if group and within is not True:
            lines.append(f"| *{title}* | | | | | | | | |")
        lines += [_line(task, one, lora) for one in sorted(group, key=lambda one: _order(task, one))]
    return "\n".join(lines) + "\n"


def _order(task: Task, one: Scored) -> tuple[bool, float]:
    mean = one.mean
    return math.isnan(mean), 0.0 if math.isnan(mean) else (-mean if task.higher_is_better else mean)


def _line(task: Task, one: Scored, lora: Scored) -> str:
    ended = [result for result in one.results if result.test is not None]
    broke = len(one.results) - len(ended)
    reason = next((result.failed for result in one.results if result.failed), "")
    said = f"{broke} of {len(one.results)} runs broke off: {_cell(reason)}" if broke else ""
    remarks = [one.remark, one.at_edge if ended else "", said]
    if not ended:
        cells = [one.name, "-", "not known", *("-" for _ in range(5))]
    else:
        scores = ", ".join(f"{score:.2f}" for score in one.scores)
        peaks = [result.peak_bytes for result in ended if result.peak_bytes is not None]
        cells = [
            one.name,
            f"**{one.mean:.2f}** ({scores})",
            against(task, one, lora),
            f"{ended[0].numbers + (ended[0].head if one.within is None else 0):,}",
            f"{one.lr:g}",
            f"{statistics.mean(result.seconds for result in ended):.1f}",
            f"{max(peaks) / 2**20:.0f}" if peaks else "-",
            number(round(ended[0].file_bytes / 1024)),
        ]
    return "| " + " | ".join([*cells, "; ".join(text for text in remarks if text)]) + " |"


def _cell(text: str, length: int = 100) -> str:
    """Return a text's first sentence for a cell of a table."""
    first = " ".join(text.replace("|", "/").split()).partition(". ")[0]
    return first if len(first) <= length else first[: length - 1] + "…"


def summary(tasks: Sequence[tuple[Task, Sequence[Scored]]]) -> str:
    """Say in a sentence per task what beats plain LoRA, what is worse and what makes no difference."""
    lines = []
    for task, scored in tasks:
        lora = next(one for one in scored if one.name == "lora")
        said = {one.name: against(task, one, lora) for one in scored if one.within is not None}
        groups = {word: [name for name, found in said.items() if found == word] for word in ("better", "worse")}
        none = sum(word == "no difference" for word in said.values())
        named = {word: ", ".join(names) or "none" for word, names in groups.items()}
        lines.append(
            f"- {task.title}: better than plain LoRA: {named['better']}; worse: {named['worse']}; no difference that "
            f"these seeds could show: {none} of {len(said) - 1}."
        )
    return "\n".join(lines) + "\n"


def put_between(page: str, text: str) -> str:
    """Return a page with other text between its markers.

    Raises:
        ValueError: the page does not have both markers, once each, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines '{BEGIN}' and '{END}' for the results to stand between.")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def picture(task: Task, scored: Sequence[Scored]) -> bytes:
    """Draw every candidate's seeds and mean, best first, with plain LoRA's mean as a line, as a PNG."""
    from lorakit.reports.theme import LABEL_SIZE, LIGHT, new_figure, set_axis_labels, set_title, style_axes, to_bytes

    shown = sorted((one for one in scored if one.scores), key=lambda one: _order(task, one), reverse=True)
    lora = next((one for one in shown if one.name == "lora"), None)
    figure = new_figure(9.0, 1.6 + 0.32 * len(shown), LIGHT)
    axes = figure.subplots()
    style_axes(axes, LIGHT, "x")
    colours = {True: LIGHT.adapted, False: LIGHT.validation, None: LIGHT.muted}
    low, high = _window(shown)
    for height, one in enumerate(shown):
        colour = colours[one.within]
        if low <= one.mean <= high:
            axes.scatter(one.scores, [height] * len(one.scores), s=18, color=colour, alpha=0.45, linewidths=0)
            axes.scatter([one.mean], [height], s=52, color=colour, linewidths=0, zorder=3)
        else:
            left = one.mean < low
            text = f"◂ {one.mean:.1f}" if left else f"{one.mean:.1f} ▸"
            side = "left" if left else "right"
            axes.text(low if left else high, height, text, ha=side, va="center", color=colour, fontsize=LABEL_SIZE)
    if lora is not None:
        axes.axvline(lora.mean, color=LIGHT.adapted, linewidth=1.0, linestyle="--", zorder=1)
    axes.set_yticks(range(len(shown)), [one.name for one in shown])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    beside = "large: mean, small: seeds; dashed: plain LoRA; orange: not at the budget; grey: for orientation"
    set_title(axes, LIGHT, task.title, beside)
    unit = "test accuracy, %" if task.score == "accuracy" else "test perplexity (lower is better)"
    set_axis_labels(axes, LIGHT, unit)
    return to_bytes(figure)


def _window(shown: Sequence[Scored]) -> tuple[float, float]:
    """Return the part of the axis that shows the seeds at the budget; what lies outside is written at its edge."""
    scores = [score for one in shown if one.within for score in one.scores] or [s for one in shown for s in one.scores]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    if len(scores) > 3:  # one that went astray must not squeeze the others
        first, _, third = statistics.quantiles(scores, n=4)
        low, high = max(low, first - 3 * (third - first)), min(high, third + 3 * (third - first))
    room = 0.25 * (high - low) or 1.0
    return low - room, high + room
