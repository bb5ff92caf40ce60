"""Rows of tokens trained whole: some tokens of an embedding, and their rows of the output head.

A vocabulary that grew has new rows in two tables, ``[vocabulary, width]`` each. They are trained in the adapter's
own copy of these rows, so that nothing of the whole table's size is copied or gets a gradient:

    W'[token] = rows[token - start]        for the tokens named, W' = W for all others

    embed_tokens[32000:32010]    tokens of an embedding: 32000 to 32009
    lm_head[32000:32010]         the same rows of a linear head

Where the two tables are one parameter they share the copy: naming one of them means both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.adapters.branches import Active
from lorakit.adapters.host import adapt
from lorakit.adapters.targets import as_entries, base_modules, is_below, tied_names
from lorakit.errors import InputError, ShapeError, TargetError, bullet_list, did_you_mean
from lorakit.layers import LayerOps, Site, Terms, find_ops
from lorakit.layers.embedding import EmbeddingOps
from lorakit.layers.linear import LinearOps
from lorakit.layers.ops import host_class
from lorakit.layers.site import PART
from lorakit.methods import Update

if TYPE_CHECKING:
    from lorakit.adapters.state import AdapterState

Rows = dict[str, tuple[str, str]]
"""Host and place by path, as ``Attached.sites`` has them."""


class RowsUpdate(Update):
    """The adapter's own copy of some rows of a table, ``rows[n, width]``.

    A tied table's copy belongs to several of these.
    """

    def __init__(self, rows: nn.Parameter) -> None:
        super().__init__()
        self.rows = rows

    @classmethod
    def at(cls, site: Site, dtype: torch.dtype) -> RowsUpdate:
        """Start with the base's rows."""
        return cls(nn.Parameter(_turned(site.ops, site.matrix()).to(dtype, copy=True).contiguous()))

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the plain change of the weight: own rows less the base's."""
        W = ops.as_matrix(layer, ops.weight(layer).detach())
        wide = torch.promote_types(W.dtype, torch.float32)
        return Terms(A=None, B=None, dense=_turned(ops, self.rows).to(wide) - W.to(wide))


def _turned(ops: LayerOps, rows: Tensor) -> Tensor:
    """Turn rows of a table into the matrix of their site, or back: an embedding's matrix has tokens as columns."""
    return rows.t() if ops.input_is_index else rows


def parted(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tell modules to train in full from rows of them, both as ``train_modules`` names them."""
    entries = as_entries(list(names))
    rows = [name for name in entries if PART.fullmatch(name)]
    return [name for name in entries if name not in rows], rows


def find_rows(model: nn.Module, names: Sequence[str], full: Sequence[str], sites: Sequence[Site]) -> Rows:
    """Find the rows that entries such as ``embed_tokens[32000:32010]`` name, and those tied to them.

    Args:
        model: the base.
        names: the entries, each by exact path or suffix.
        full: paths of modules that are trained in full.
        sites: where low-rank updates act.

    Raises:
        TargetError: an entry matches nothing, or rows that are trained otherwise too.
        UnsupportedLayerError, ShapeError: a layer that is no table of rows, or rows that it does not have.
    """
    problems: list[str] = []
    found: dict[str, Site] = {}
    for name in names:
        part = PART.fullmatch(name)
        assert part is not None
        if not part["parts"][0].isdigit():
            problems.append(f"'{name}': rows to train whole are named by number, as in {part['path']}[0:8]")
            continue
        paths = [p for p in base_modules(model) if p == part["path"] or p.endswith(f".{part['path']}")]
        if not paths:
            known = {p.rpartition(".")[2] for p, module in base_modules(model).items() if _is_table(module)}
            problems.append(f"no module matches '{name}'.{did_you_mean(part['path'], known)}")
        for path in paths:
            try:
                found.update(_with_twins(model, path, part["parts"]))
            except InputError as error:
                problems.append(str(error).rstrip("."))
    problems += _taken(found.values(), full, sites)
    if problems:
        raise TargetError(bullet_list(problems))
    order = {path: i for i, path in enumerate(base_modules(model))}
    ordered = sorted(found.values(), key=lambda site: (order[site.host], site.runs or ()))
    return {site.path: (site.host, site.place) for site in ordered}


def saved_rows(model: nn.Module, state: AdapterState) -> Rows:
    """Find a saved adapter's rows in a model, and those tied to them there.

    Raises:
        TargetError: the model lacks one of the tables.
        ShapeError: a table has too few or other rows, or tables that were apart are tied here.
    """
    found: dict[str, Site] = {}
    modules = base_modules(model)
    for path, saved in state.rows.items():
        part = PART.fullmatch(path)
        if part is None or part["path"] not in modules:
            raise TargetError(f"the adapter has rows '{path}' that this model lacks.{did_you_mean(path, modules)}")
        here = _with_twins(model, part["path"], part["parts"])
        shape, wanted = tuple(saved.tensors["rows"].shape), _shape(here[path])
        if shape != wanted:
            raise ShapeError(f"'{path}' has rows {list(wanted)} here, but {list(shape)} in the adapter.")
        apart = [twin for twin in here if twin != path and twin in state.rows]
        if apart:
            raise ShapeError(f"'{path}' and '{apart[0]}' are one table here, but two in the adapter.")
        found.update(here)
    return {path: (site.host, site.place) for path, site in found.items()}


def install_rows(
    model: nn.Module, name: str, active: Active, rows: Mapping[str, tuple[str, str]], dtype: torch.dtype
) -> None:
    """Put an adapter's copies of rows into their hosts; tied tables get one. Changes the hosts' class."""
    made: dict[tuple[int, object], RowsUpdate] = {}
    for path in rows:
        site = Site.at(model, path)
        key = id(site.ops.weight(site.layer)), site.runs
        first = made.get(key)
        update = RowsUpdate.at(site, dtype) if first is None else RowsUpdate(first.rows)
        made.setdefault(key, update)
        branches = adapt(site.host, site.layer, find_ops(site.layer) or site.ops, active)
        branches.put_update(name, site.place, site.ops, update.train(site.layer.training))


def _with_twins(model: nn.Module, path: str, part: str) -> dict[str, Site]:
    """Return the rows of one table, and the same rows of every table that is the same parameter."""
    site = _site(model, path, part)
    twins = tied_names(model).get(f"{site.host}.{site.ops.parameter}", [])
    sites = [site, *(_site(model, twin.rpartition(".")[0], part) for twin in twins)]
    return {site.path: site for site in sites}


def _site(model: nn.Module, path: str, part: str) -> Site:
    module = model.get_submodule(path)
    if not _is_table(module):
        kind = host_class(module).__name__
        raise TargetError(f"'{path}' is a {kind}: only rows of an nn.Embedding or nn.Linear are trained whole.")
    site = Site.at(model, f"{path}[{part}]")
    if site.runs is None:
        raise TargetError(f"'{path}[{part}]' is all of it: name '{path}' to train it in full.")
    return site


def _is_table(module: nn.Module) -> bool:
    ops = find_ops(module)
    return isinstance(ops, (EmbeddingOps, LinearOps)) and ops.refusal(module) is None


def _shape(site: Site) -> tuple[int, int]:
    return (site.d_in, site.d_out) if site.ops.input_is_index else (site.d_out, site.d_in)


def _taken(found: Iterable[Site], full: Sequence[str], sites: Sequence[Site]) -> list[str]:
    """Say which rows are trained otherwise as well, or twice."""
    problems = []
    before: dict[tuple[str, int], str] = {}
    found = list(found)
    hosts = {site.host for site in found}
    for site in sites:
        if site.host in hosts:
            runs = site.runs or ((0, site.ops.weight(site.layer).shape[0]),)
            before.update({(site.host, row): site.path for run in runs for row in range(*run)})
    for site in found:
        if is_below(site.host, full):
            problems.append(f"'{site.path}': '{site.host}' is trained in full anyway")
            continue
        own = {(site.host, row) for run in site.runs or () for row in range(*run)}
        other = next((before[key] for key in sorted(own & before.keys())), None)
        if other is not None:
            problems.append(f"'{site.path}' and '{other}' are the same numbers: name one of them")
        before.update(dict.fromkeys(own, site.path))
    return problems
