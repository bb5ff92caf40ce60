"""Terminal tables of what is inside an adapter's updates: by kind of layer, and the largest ones.

They fit 80 columns: what all layers' paths begin with is said once, and long names lose their middle.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorakit.records import AdapterSimilarity, AdapterSpectrum, LayerSimilarity, SimilarityAt
from lorakit.reports import wording
from lorakit.reports.spectrum import (
    LayerGroup,
    LearnedLayer,
    Read,
    by_kind,
    by_path,
    common_prefix,
    energy_at,
    kinds_of,
    largest_first,
    learned_layers,
    lower_ranks,
    overlap_figure,
    rank_for_energy,
    short_names,
    update_size,
)

_NAME_WIDTH, _NARROW = 24, 16
_RANKS_AT_MOST = 6
_ENERGY_SHARE = 0.9
_NAMES_AT_MOST = 4


def spectrum_tables(found: AdapterSpectrum, top: int | None = 5) -> RenderableType:
    """Lay out all figures: by kind of layer, and the layers with the largest updates.

    Args:
        found: what was found.
        top: how many layers to list, those with the largest updates first; None for all.
    """
    layers = learned_layers(found.layers)
    kinds = by_kind(layers)
    parts = [_size_table(kinds), _energy_table(kinds)]
    if any(layer.overlap is not None for layer in layers):
        parts.append(_overlap_table(kinds))
    if top is None or top > 0:
        parts.append(_layer_table(layers, top))
    parts += [_plain("\n".join(lines)) for lines in (extremes(layers),) if lines]
    if found.similarity is not None:
        parts += _similarity_parts(found.similarity)
    return Group(*(_apart(part) for part in parts))


def _apart(part: RenderableType) -> RenderableType:
    return Padding(part, (1, 0, 0, 0))


def extremes(layers: Sequence[LearnedLayer]) -> list[str]:
    """Name the layers at both ends: by size and by how many directions they use."""
    groups = largest_first(by_path(layers))
    if len(groups) < 2:
        return []
    prefix = common_prefix([group.name for group in groups])
    relative = all(layer.relative_norm is not None for layer in layers)
    size = update_size(relative)

    def named(group: LayerGroup) -> str:
        value = group.median(size) or 0.0
        return f"{_below(group.name, prefix)} ({wording.percent(value) if relative else wording.significant(value)})"

    spread = sorted(groups, key=lambda group: group.median(lambda layer: layer.rank_share) or 0.0)

    def used(group: LayerGroup) -> str:
        return f"{_below(group.name, prefix)} ({_of_rank(group)})"

    return [
        f"Largest update {named(groups[0])}, smallest {named(groups[-1])}.",
        f"Most directions used {used(spread[-1])}, fewest {used(spread[0])}.",
    ]


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(first, overflow="fold", min_width=12)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _titled(title: str, table: Table, remark: str = "") -> RenderableType:
    below = [_plain(remark, "dim")] if remark else []
    return Group(_plain(title, "bold"), table, *below)


def _plain(text: str, style: str = "") -> Text:
    """Return a text that is no markup; names come from files, so nothing in it may steer the terminal."""
    return Text(wording.printable(text), style=style, overflow="fold")


def _with_chance(here: str, chance: str) -> Text:
    return Text.assemble(wording.printable(here), "\n", (chance, "dim"))


def _size_table(kinds: Sequence[LayerGroup]) -> RenderableType:
    relative = any(group.values(lambda layer: layer.relative_norm) for group in kinds)
    last = "% of base weight" if relative else "largest value"
    table = _table("layers", "#", "effective rank", "of", "norm", last)
    names = short_names([group.name for group in kinds], _NAME_WIDTH)
    for group in kinds:
        norm = wording.significant(group.median(lambda layer: layer.norm))
        share = _spread(group, _percentage) if relative else None
        table.add_row(
            _plain(names[group.name]),
            _count(group),
            _spread(group, lambda layer: layer.effective_rank, lambda used: f"{used:.1f}"),
            _rank_words(group),
            norm,
            share or wording.significant(group.median(lambda layer: layer.largest)),
        )
    return _titled("Updates by kind of layer, medians (least..most)", table)


def _energy_table(kinds: Sequence[LayerGroup]) -> RenderableType:
    ranks = shown_ranks(max((layer.rank for group in kinds for layer in group.layers), default=1))
    table = _table("layers", *(f"rank {rank}" for rank in ranks), "90 % at")
    names = short_names([group.name for group in kinds], _NAME_WIDTH)
    for group in kinds:
        kept = (group.median(energy_at(rank)) for rank in ranks)
        needed = statistics.median_high(rank_for_energy(x.singular_values, _ENERGY_SHARE) for x in group.layers)
        table.add_row(_plain(names[group.name]), *(wording.percent(share) for share in kept), f"rank {needed}")
    return _titled("Energy kept at lower ranks: share of the squared singular values, medians", table)


def shown_ranks(rank: int) -> list[int]:
    """Return the lower ranks that a table has room for: the powers of two, or of four."""
    ranks = lower_ranks(rank)
    return ranks if len(ranks) <= _RANKS_AT_MOST else ranks[::-1][::2][::-1][-_RANKS_AT_MOST:]


def _overlap_table(kinds: Sequence[LayerGroup]) -> RenderableType:
    table = _table("layers", "outputs", "inputs", "both", "amplification")
    names = short_names([group.name for group in kinds], _NAME_WIDTH)
    reads: list[tuple[str, Callable[[float | None], str]]] = [
        ("outputs", wording.percent),
        ("inputs", wording.percent),
        ("both", wording.percent),
        ("amplification", _times),
    ]
    for group in kinds:
        cells = []
        for name, write in reads:
            here, chance = (group.median(overlap_figure(field)) for field in (name, f"{name}_random"))
            cells.append(_with_chance(write(here), write(chance)))
        table.add_row(_with_chance(names[group.name], "  by chance"), *cells)
    title = "Share of the update inside its base weight's first singular directions, medians"
    remark = (
        "Outputs: what it writes to, inputs: what it reads from; as many directions as it has itself. Amplification: "
        "its norm over the base weight's in the update's own directions (Hu et al. 2021, section 7.3)."
    )
    return _titled(title, table, remark)


def _layer_table(layers: Sequence[LearnedLayer], top: int | None) -> RenderableType:
    groups = largest_first(by_path(layers))
    shown = groups if top is None else groups[:top]
    prefix = common_prefix([group.name for group in groups])
    relative = any(layer.relative_norm is not None for layer in layers)
    inside = any(layer.overlap is not None for layer in layers)
    table = _table(
        "layer",
        "eff. rank",
        "norm",
        *(["% of base"] if relative else []),
        "at half",
        *(["inside", "amplif."] if inside else []),
    )
    stacks = any(len(group.layers) > 1 for group in shown)
    names = short_names([_below(group.name, prefix) for group in shown], _NARROW if stacks else _NAME_WIDTH)
    for group in shown:
        cells = [_of_rank(group), wording.significant(group.median(lambda layer: layer.norm))]
        if relative:
            cells.append(_spread(group, _percentage))
        cells.append(wording.percent(group.median(lambda layer: layer.half_energy)))
        if inside:
            cells.append(wording.percent(group.median(overlap_figure("both"))))
            cells.append(_times(group.median(overlap_figure("amplification"))))
        table.add_row(_plain(names[_below(group.name, prefix)]), *cells)
    title = f"All {len(groups):,} layers" if len(shown) == len(groups) else "Largest updates"
    title += f", below {prefix}" if prefix else ""
    rest = f"{len(groups) - len(shown):,} more with --all." if len(shown) < len(groups) else ""
    remarks = ["At half: energy kept at half the rank."]
    remarks += ["Of a stack of matrices medians (least..most)."] if stacks else []
    return _titled(title, table, " ".join([*remarks, *([rest] if rest else [])]))


def _similarity_parts(similarity: AdapterSimilarity) -> Iterator[RenderableType]:
    """Lay out two adapters side by side, and name what only one of them has."""
    table = _table("layers", "#", "A, first", "A, all", "B, first", "B, all")
    found = kinds_of([layer.path for layer in similarity.layers])
    kinds: dict[str, list[LayerSimilarity]] = {}
    for layer in similarity.layers:
        kinds.setdefault(found[layer.path][0], []).append(layer)
    names = short_names(list(kinds), _NAME_WIDTH)
    for kind, inside in kinds.items():
        known = [layer for layer in inside if layer.at]
        cells = [_alike(known, side, which) for side in ("A", "B") for which in (0, -1)]
        number = str(len({layer.path for layer in inside}))
        table.add_row(_with_chance(names[kind], "  by chance"), number, *cells)
    title = f"Likeness to {similarity.other}: first directions and subspaces of A and B, medians"
    yield _titled(title, table, "0 is orthogonal, 1 the same (Hu et al. 2021, eq. 4).")
    for paths, where in ((similarity.only_here, "here"), (similarity.only_there, "there")):
        if paths:
            shown = ", ".join(paths[:_NAMES_AT_MOST]) + (", ..." if len(paths) > _NAMES_AT_MOST else "")
            yield _plain(f"{wording.plural(len(paths), 'layer')} only {where}: {shown}")


def _alike(layers: Sequence[LayerSimilarity], side: str, which: int) -> Text:
    if not layers:
        return Text("-")
    chance = "inputs_random" if side == "A" else "outputs_random"

    def median(name: str) -> str:
        values: list[SimilarityAt] = [layer.at[which] for layer in layers]
        return wording.decimal(statistics.median(getattr(value, name) for value in values))

    return _with_chance(median(side), median(chance))


def _below(path: str, prefix: str) -> str:
    return path.removeprefix(f"{prefix}.") if prefix else path


def _count(group: LayerGroup) -> str:
    num_layers = len({layer.path for layer in group.layers})
    return str(num_layers) if num_layers == len(group.layers) else f"{num_layers} x {len(group.layers) // num_layers}"


def _of_rank(group: LayerGroup) -> str:
    used = group.median(lambda layer: layer.effective_rank) or 0.0
    return f"{used:.1f} of {_rank_words(group)}"


def _rank_words(group: LayerGroup) -> str:
    ranks = sorted({layer.rank for layer in group.layers})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"


def _spread(group: LayerGroup, read: Read, write: Callable[[float], str] = wording.significant) -> str:
    """Write median, least and most of a figure; the median alone where there is one value."""
    values = group.values(read)
    if not values:
        return wording.ABSENT
    median = write(statistics.median(values))
    return median if len(values) < 2 else f"{median} ({write(min(values))}..{write(max(values))})"


def _percentage(layer: LearnedLayer) -> float | None:
    return None if layer.relative_norm is None else 100.0 * layer.relative_norm


def _times(factor: float | None) -> str:
    return wording.ABSENT if factor is None else f"{wording.significant(factor)} x"
