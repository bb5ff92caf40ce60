"""Terminal table of what compressing an adapter gave, by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.reports import wording
from lorakit.reports.spectrum import common_prefix, kinds_of, short_names

if TYPE_CHECKING:
    from lorakit.compose.compress import CutLayer
    from lorakit.training.compressing import CompressedRun

_NAME_WIDTH = 18


def compression_table(report: CompressedRun) -> RenderableType:
    """Lay out ranks, numbers, energy and error by kind of layer, and of the whole adapter in the last row."""
    cuts = report.found.layers
    kinds = kinds_of([cut.path for cut in cuts])
    groups: dict[str, list[CutLayer]] = {}
    for cut in cuts:
        groups.setdefault(kinds[cut.path][0], []).append(cut)
    prefix = common_prefix(list(groups))
    names = short_names([kind.removeprefix(f"{prefix}.") if prefix else kind for kind in groups], _NAME_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("layers", overflow="fold", min_width=12)
    for name in ("#", "rank", "numbers", "energy", "predicted", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, group in zip(names.values(), groups.values(), strict=True):
        table.add_row(*_row(name, group))
    table.add_section()
    table.add_row(*_row("all", cuts), style="bold")
    below = f" Layers are below {prefix}." if prefix else ""
    words = f"energy: share of sigma^2 that is kept. predicted, measured: relative Frobenius error.{below}"
    return Group(table, Text(wording.printable(words), style="dim", overflow="fold"))


def size_line(report: CompressedRun) -> str:
    """Return the sizes of the adapter's file."""
    dropped = sum(cut.rank_after == 0 for cut in report.found.layers)
    gone = f"; {wording.plural(dropped, 'layer')} left out entirely" if dropped else ""
    share = report.bytes_after / max(1, report.bytes_before)
    sizes = f"{wording.size(report.bytes_before)} -> {wording.size(report.bytes_after)}"
    return f"File  {sizes} ({100 * share:.0f} %){gone}"


def _row(name: str, cuts: Sequence[CutLayer]) -> list[Text]:
    energy = math.fsum(cut.energy for cut in cuts)
    lost, found = (math.fsum(values) for values in ([c.predicted for c in cuts], [c.measured for c in cuts]))

    def relative(square: float) -> str:
        return f"{math.sqrt(square / energy):.3g}" if energy > 0.0 else "-"

    cells = [
        name,
        f"{len(cuts):,}",
        f"{_range([cut.rank_before for cut in cuts])} → {_range([cut.rank_after for cut in cuts])}",
        " → ".join(
            wording.count(sum(numbers))
            for numbers in ([cut.numbers_before for cut in cuts], [cut.numbers_after for cut in cuts])
        ),
        f"{100 * (1 - lost / energy):.2f} %" if energy > 0.0 else "-",
        relative(lost),
        relative(found),
    ]
    return [Text(wording.printable(cell), overflow="fold") for cell in cells]


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low}-{high}"
