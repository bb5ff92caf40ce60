"""Terminal tables (rich): what a run, an evaluation, its choices and its samples say.

They fit 80 columns, carry no meaning by colour alone, and show labels and texts of the data as text,
never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorakit.records import Choice, Evaluation, RunSummary, Sample
from lorakit.reports import comparison, costs, wording

_LABEL_LENGTH = 32
_SAMPLE_LENGTH = 400
_SHORT_ANSWER = 30
_MARKS = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("-", "dim")}


def summary_table(summary: RunSummary, metrics: Sequence[Mapping[str, Any]] = ()) -> RenderableType:
    """Lay out a finished run: models side by side, F1 per class, facts, plan and cost, and what was proven.

    Args:
        summary: what the run reports.
        metrics: the lines of ``metrics.jsonl``, which say what was planned.
    """
    parts: list[RenderableType] = []
    if not summary.finished:
        parts.append(Text("Interrupted: these are the results of the adapter so far.", style="bold yellow"))
    parts.append(_measures_table(summary))
    if comparison.is_classification(summary) and summary.after.classes:
        parts.append(_class_table(summary))
    parts.append(_facts_table(summary))
    rows = costs.cost_rows(summary, metrics)
    if rows:
        parts.append(_cost_table(rows))
    parts.append(_proof_table(summary))
    warning = comparison.caution(summary)
    if warning is not None:
        parts.append(Padding(Text(warning, style="bold yellow"), (0, 2)))
    return Group(*parts)


def _plain_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=True,
        header_style="bold",
    )


def _data_text(text: str, length: int = _LABEL_LENGTH, style: str = "") -> Text:
    return Text(wording.shortened(wording.printable(text), length), style=style, overflow="fold")


def _measures_table(summary: RunSummary) -> Table:
    table = _plain_table(f"Before and after, on {wording.plural(summary.after.num_rows, 'held-out row')}")
    table.add_column("", no_wrap=True)
    for column, _ in comparison.models(summary):
        table.add_column(f"{column.name}\n[dim]{column.remark}[/dim]", justify="right")
    for row in comparison.measures(summary):
        cells = [Text(text, style="bold" if index == row.best else "") for index, text in enumerate(row.texts)]
        table.add_row(row.name, *cells)
    return table


def _class_table(summary: RunSummary) -> Table:
    table = _plain_table("F1 per class")
    table.add_column("class", overflow="fold")
    for heading in ("rows", "before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.class_rows(summary):
        style = "green" if row.change > 0 else ("red" if row.change < 0 else "dim")
        table.add_row(
            _data_text(row.label),
            wording.count(row.support),
            wording.decimal(row.before, 2),
            wording.decimal(row.after, 2),
            Text(f"{row.change:+.2f}", style=style),
        )
    return table


def _facts_table(summary: RunSummary) -> Table:
    table = _plain_table("What it took")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for fact in comparison.facts(summary):
        table.add_row(fact.name, fact.value, fact.detail)
    return table


def _cost_table(rows: Sequence[costs.CostRow]) -> Table:
    table = _plain_table("Planned and measured")
    table.add_column("", overflow="fold")
    for heading in ("planned", "measured", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, row.planned, row.measured, Text(row.difference, style="dim"))
    return table


def _proof_table(summary: RunSummary) -> Table:
    table = _plain_table("Proof")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", overflow="fold")
    for line in comparison.proof_lines(summary.proof):
        mark, style = _MARKS[line.passed]
        table.add_row(line.claim, Text(mark, style=style), line.detail)
    return table


def evaluation_table(evaluation: Evaluation, labels: Sequence[str]) -> RenderableType:
    """Lay out one evaluation: its measures, and per class precision, recall and F1.

    Args:
        evaluation: what was measured.
        labels: class names in logit order; empty for tokens.
    """
    table = _plain_table(f"On {wording.plural(evaluation.num_rows, 'row')}")
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    if labels:
        table.add_row("accuracy", Text(wording.percent(evaluation.accuracy), style="bold"))
        table.add_row("macro F1", wording.decimal(evaluation.macro_f1))
        table.add_row("loss (nats/row)", wording.decimal(evaluation.loss))
        mistakes = comparison.confusions(evaluation, tuple(labels))
        return Group(table, _scores_table(evaluation), *([_mistakes_table(mistakes)] if mistakes else []))
    table.add_row("loss (nats/token)", wording.decimal(evaluation.loss))
    table.add_row("perplexity", Text(wording.significant(comparison.perplexity(evaluation)), style="bold"))
    table.add_row("token accuracy", wording.percent(evaluation.accuracy))
    table.add_row("supervised tokens", wording.count(evaluation.num_tokens or 0))
    return table


def _scores_table(evaluation: Evaluation) -> Table:
    table = _plain_table("Per class")
    table.add_column("class", overflow="fold")
    for heading in ("rows", "precision", "recall", "F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for score in evaluation.classes:
        numbers = (wording.decimal(value, 2) for value in (score.precision, score.recall, score.f1))
        table.add_row(_data_text(score.label), wording.count(score.support), *numbers)
    return table


def _mistakes_table(mistakes: Sequence[tuple[str, str, int]]) -> Table:
    table = _plain_table("Most frequent mistakes")
    table.add_column("truth", overflow="fold")
    table.add_column("predicted", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    for truth, predicted, rows in mistakes:
        table.add_row(_data_text(truth), _data_text(predicted), wording.count(rows))
    return table


def choices_table(choices: Sequence[Choice]) -> RenderableType:
    """Lay out the settings of a run, each with its reason."""
    table = _plain_table("Settings")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=34)
    table.add_column("reason", style="dim", overflow="fold")
    for choice in choices:
        table.add_row(
            Text(choice.name),
            _data_text(choice.value, _SAMPLE_LENGTH),
            _data_text(choice.reason, _SAMPLE_LENGTH),
        )
    return table


def samples_table(samples: Sequence[Sample]) -> RenderableType:
    """Lay out held-out rows before and after: side by side where answers are short, else below each other."""
    answers = [text for sample in samples for text in (sample.expected, sample.before, sample.after)]
    if all(len(answer) <= _SHORT_ANSWER and "\n" not in answer for answer in answers):
        table = _plain_table("Samples")
        table.add_column("input", overflow="fold", ratio=2, min_width=20)
        for heading in ("expected", "before", "after"):
            table.add_column(heading, overflow="fold")
        for sample in samples:
            style = "green" if _starts_with_label(sample.after, sample.expected) else "red"
            table.add_row(
                _data_text(sample.input, _SAMPLE_LENGTH // 2),
                _data_text(sample.expected),
                _data_text(sample.before, style="dim"),
                _data_text(sample.after, style=style),
            )
        return table
    stacked = _plain_table("Samples")
    stacked.show_header = False
    stacked.add_column(style="dim", no_wrap=True)
    stacked.add_column(overflow="fold")
    for sample in samples:
        stacked.add_row("input", _data_text(sample.input, _SAMPLE_LENGTH))
        stacked.add_row("expected", _data_text(sample.expected, _SAMPLE_LENGTH))
        stacked.add_row("before", _data_text(sample.before, _SAMPLE_LENGTH, style="dim"))
        stacked.add_row("after", _data_text(sample.after, _SAMPLE_LENGTH, style="bold"), end_section=True)
    return stacked


def _starts_with_label(answer: str, label: str) -> bool:
    """Tell whether ``label (probability)`` names ``label``."""
    return answer == label or answer.rpartition(" (")[0] == label
