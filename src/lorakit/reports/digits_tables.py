"""The digits demo in the terminal: errors per digit, what was added and what was proven, in 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorakit.reports import digits_words, wording
from lorakit.reports.digits_record import DigitsSummary

_NAME_WIDTH = 11


def digits_tables(summary: DigitsSummary) -> RenderableType:
    """Lay out the whole result."""
    return Group(
        *[_named(name, text) for name, text in digits_words.setting(summary)],
        _errors(summary),
        *[_named(name, text) for name, text in digits_words.outcomes(summary)],
        _layers(summary),
        Padding(Text(digits_words.added(summary)), (0, 0, 0, 2)),
        _claims(summary),
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="bold")


def _errors(summary: DigitsSummary) -> Table:
    table = _table(f"\nErrors on {wording.count(summary.num_test)} test images")
    table.add_column("digit", no_wrap=True)
    columns = [summary.before, *(adapter.after for adapter in summary.adapters), summary.disabled]
    for heading in ("images", "before", *(adapter.name for adapter in summary.adapters), "disabled"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    for digit, row in enumerate(summary.before.confusion):
        chosen = digit == summary.digit
        mark = f"{digit}  <- trained" if chosen else str(digit)
        cells = [wording.count(sum(row)), *(wording.count(column.errors[digit]) for column in columns)]
        table.add_row(mark, *cells, style="bold" if chosen else "", end_section=digit == 9)
    totals = [wording.count(column.total) for column in columns]
    table.add_row("all digits", wording.count(summary.num_test), *totals, style="bold")
    table.add_row("accuracy", "", *(wording.percent(column.accuracy) for column in columns))
    return table


def _named(name: str, text: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=_NAME_WIDTH, no_wrap=True)
    table.add_column()
    table.add_row(Text(f"  {name}", style="bold"), text)
    return table


def _layers(summary: DigitsSummary) -> Table:
    table = _table("\nWhat was added: its singular value, and its norm by the base weight's")
    table.add_column("layer", no_wrap=True)
    for heading in ("weight", "numbers added", *(adapter.name for adapter in summary.adapters)):
        table.add_column(heading, justify="right", no_wrap=True)
    for layers in zip(*(adapter.layers for adapter in summary.adapters), strict=True):
        sizes = [
            f"{'  '.join(wording.significant(value) for value in layer.singular_values)}"
            f"  {wording.percent(layer.relative_norm):>6}"
            for layer in layers
        ]
        first = layers[0]
        weight = f"{wording.count(first.d_out)} x {wording.count(first.d_in)}"
        table.add_row(first.path, weight, wording.count(first.num_numbers), *sizes)
    return table


def _claims(summary: DigitsSummary) -> Table:
    table = _table("\nProof")
    table.show_header = False
    table.add_column(overflow="fold", ratio=2)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", overflow="fold", ratio=3)
    for claim in summary.claims:
        mark = Text("yes", style="green") if claim.passed else Text("NO", style="bold red")
        table.add_row(claim.claim, mark, claim.detail)
    return table
