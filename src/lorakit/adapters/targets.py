"""Which layers an adapter acts on: names, suffixes, globs, regular expressions and words.

An entry is one of

    attention, mlp, all-linear      a word
    re:PATTERN                      a regular expression that must match the whole path
    a path with * ? or [            a glob over the whole path
    anything else                   an exact path, or a suffix of it after a dot

A path is that of a layer, which means all its weights, or that of one of several weights of a layer, such
as ``lstm.weight_hh_l0``, ``self_attn.out_proj``, ``mlp.experts.down_proj``. Parts of a fused projection
stand behind it in brackets: ``c_attn[q,v]``, or by rows, ``c_attn[0:768]``. Every entry must match
something that can be adapted, also when other entries do.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.adapters.blocks import Layers, layer_filter
from lorakit.adapters.walk import walk, walk_parameters
from lorakit.adapters.words import WORDS, sites_of_word
from lorakit.errors import InputError, TargetError, UnsupportedLayerError, bullet_list, did_you_mean, quoted
from lorakit.layers import BranchOps, Site, ops_for, sites_of
from lorakit.layers.ops import host_class, is_matrix
from lorakit.layers.site import PART, part_site


def as_entries(value: str | Iterable[str] | None) -> list[str]:
    """Return a list of entries from one, several in a comma-separated string, or a list."""
    if value is None:
        return []
    if isinstance(value, str):
        if value.startswith("re:"):
            return [value]
        return [part.strip() for part in re.split(r",(?![^\[]*\])", value) if part.strip()]
    return list(value)


def base_modules(model: nn.Module, read: bool = False) -> dict[str, nn.Module]:
    """Return the base's modules by path, without the root and what attaching added.

    What lies in an attention of torch's, which reads its weights itself, is left out unless ``read``.
    """
    modules = {path: module for path, module in walk(model) if path}
    attentions = [path for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    return {p: m for p, m in modules.items() if read or not any(p.startswith(f"{a}.") for a in attentions)}


def find_sites(
    model: nn.Module,
    targets: str | Iterable[str],
    exclude: str | Iterable[str] | None = None,
    layers: Layers | None = None,
    skip: Sequence[str] = (),
) -> list[Site]:
    """Find the sites that ``targets`` name, in the model's order.

    Args:
        model: the base.
        targets: entries as the module's docstring says.
        exclude: entries to leave out again.
        layers: block numbers to keep, such as ``"0-5"``, ``"last:4"``, ``[0, 2]``; paths without a
            block number fall out.
        skip: paths of modules trained in full, which are never targets too.

    Raises:
        TargetError: an entry matches nothing (all such entries are named), or nothing is left.
        UnsupportedLayerError: an entry names a layer that cannot be adapted.
    """
    everything = Places.of(model, skip)
    problems: list[str] = []
    chosen: dict[str, Site] = {}
    dropped: set[str] = set()
    unsupported: list[str] = []
    for entry in as_entries(targets):
        try:
            chosen.update(_match(model, everything, entry, strict=True))
        except UnsupportedLayerError as error:
            unsupported.append(str(error))
        except InputError as error:
            problems.append(str(error))
    for entry in as_entries(exclude):
        try:
            dropped |= _excluded(model, everything, entry)
        except InputError as error:
            problems.append(f"exclude: {error}")
    if problems:
        raise TargetError(bullet_list([*problems, *unsupported]))
    if unsupported:
        raise UnsupportedLayerError(bullet_list(unsupported))
    keep = layer_filter(layers, everything.modules)
    sites = [site for path, site in chosen.items() if not is_below(path, dropped) and keep(path)]
    if not sites:
        raise TargetError("no target is left after excludes and the range of layers.")
    _refuse_overlaps(sites)
    order = {path: i for i, path in enumerate(everything.modules)}
    places = {path: i for i, path in enumerate(everything.sites)}
    return sorted(sites, key=lambda site: (order[site.host], places.get(site.path, 0), site.runs or ()))


@dataclass(frozen=True)
class Places:
    """What entries are matched against.

    Attributes:
        modules: the base's modules by path, without those whose weights their parent reads itself.
        sites: every whole weight that can be updated, by path.
    """

    modules: dict[str, nn.Module]
    sites: dict[str, Site]

    @classmethod
    def of(cls, model: nn.Module, skip: Sequence[str] = ()) -> Places:
        """Find them in ``model``, leaving out what lies at or below ``skip``."""
        modules = {path: module for path, module in base_modules(model).items() if not is_below(path, skip)}
        sites = {p: site for path, module in modules.items() for p, site in sites_of(path, module).items()}
        return cls(modules, sites)

    def at(self, path: str) -> dict[str, Site]:
        """Return the sites that a path of a layer or of one of its weights means."""
        if path in self.sites:
            return {path: self.sites[path]}
        return {p: site for p, site in self.sites.items() if site.host == path}

    def paths(self) -> list[str]:
        """Return every path that an entry can match: of modules, and of weights that are no module's."""
        return list(dict.fromkeys([*self.modules, *self.sites]))


def _refuse_overlaps(sites: Sequence[Site]) -> None:
    """Refuse a part of a projection beside all of it, or parts that share rows.

    Raises:
        TargetError: naming them.
    """
    problems = []
    together: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        together.setdefault((site.host, site.ops.parameter), []).append(site)
    for several in together.values():
        taken: dict[int, str] = {}
        for site in several if len(several) > 1 else ():
            own = range(site.d_out) if site.runs is None else [i for run in site.runs for i in range(*run)]
            clash = next((taken[i] for i in own if i in taken), None)
            if clash is not None:
                problems.append(f"'{clash}' and '{site.path}' are rows of one matrix and overlap: name one of them")
            taken.update(dict.fromkeys(own, site.path))
    if problems:
        raise TargetError(bullet_list(problems))


def refuse_read_by_parent(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse modules below one that reads its children's weights itself, so that a copy would never run.

    Raises:
        UnsupportedLayerError: naming every such module.
    """
    problems = []
    for path in paths:
        parent_path, _, _ = path.rpartition(".")
        while parent_path:
            parent = model.get_submodule(parent_path)
            if isinstance(parent, nn.MultiheadAttention):
                problems.append(
                    f"module '{path}' belongs to a {host_class(parent).__name__} ('{parent_path}'), which reads its "
                    f"weights itself: a copy would never run. Train '{parent_path}' in full, or adapt it by a target."
                )
                break
            parent_path, _, _ = parent_path.rpartition(".")
    if problems:
        raise UnsupportedLayerError(bullet_list(problems))


def _match(model: nn.Module, everything: Places, entry: str, strict: bool) -> dict[str, Site]:
    """Return the sites that one entry names, by path."""
    if entry in WORDS:
        found = word_targets(model, everything, entry)
        if not found:
            raise TargetError(f"no layer matches the word '{entry}': this model has no such linear layers by name.")
        return found
    part = PART.fullmatch(entry)
    if part is not None and not entry.startswith("re:"):
        return _parts(model, everything, part["path"], part["parts"])
    paths = everything.paths()
    exact = False
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise TargetError(f"target '{entry}' is not a regular expression: {error}.") from None
        hits = [p for p in paths if pattern.fullmatch(p)]
    elif any(sign in entry for sign in "*?["):
        hits = [p for p in paths if fnmatch.fnmatchcase(p, entry)]
    else:
        hits, exact = [p for p in paths if p == entry or p.endswith("." + entry)], True
    hits = hits or _parameters_at(everything, entry)
    if not hits:
        raise TargetError(_no_match(everything, entry))
    found = {}
    for path in hits:
        sites = everything.at(path) or _parameter_site(model, path)
        if not sites and exact and strict:
            _refuse(everything, path, entry)
        found.update(sites)
    if not found and strict:
        for path in hits:
            _refuse(everything, path, entry)
    return found


def _excluded(model: nn.Module, everything: Places, entry: str) -> set[str]:
    """Return the paths that an entry leaves out: of sites, or of modules whose sites are all left out."""
    found = set(_match(model, everything, entry, strict=False))
    if found or entry in WORDS or PART.fullmatch(entry):
        return found
    if entry.startswith("re:"):
        return {p for p in everything.modules if re.fullmatch(entry[3:], p)}
    return {p for p in everything.modules if fnmatch.fnmatchcase(p, entry) or p == entry or p.endswith("." + entry)}


def _no_match(everything: Places, entry: str) -> str:
    """Say that nothing is called so, with the closest names there are."""
    last = {path.rsplit(".", 1)[-1] for path in everything.sites}
    if not last:
        return f"no layer matches target '{entry}': this model has no layer that can be adapted by name."
    near = did_you_mean(entry, {*everything.sites, *last, *WORDS}) or f" Layers here: {quoted(sorted(last))}."
    return f"no layer matches target '{entry}'.{near} See `lorakit inspect MODEL`."


def _parts(model: nn.Module, everything: Places, entry: str, parts: str) -> dict[str, Site]:
    """Return the sites of some parts of every fused projection that ``entry`` names."""
    names = [name.strip() for name in parts.split(",")]
    wholes = [site for site in _match(model, everything, entry, strict=True).values() if site.runs is None]
    maps = [site.path for site in wholes if isinstance(site.ops, BranchOps) and not site.ops.channels_last]
    if maps:
        raise UnsupportedLayerError(
            f"target '{entry}[{parts}]': rows of a convolution are not updated apart. Name {quoted(maps)} whole."
        )
    tables = [site.path for site in wholes if site.ops.input_is_index]
    if tables:
        raise UnsupportedLayerError(
            f"target '{entry}[{parts}]': tokens of an embedding have no low-rank update; they are trained whole, by "
            f"train_modules='{tables[0]}[{parts}]'. Name {quoted(tables)} without the tokens to adapt it all."
        )
    apart = {f"{name}_proj_weight" for name in names}  # of an attention with projections of their own
    found = [site for site in wholes if site.path.rsplit(".", 1)[-1] in apart]
    split = {site.host for site in wholes if site.ops.parts(site.layer)}
    for site in wholes:
        beside = site.ops.is_attention or site.host in split
        if site in found or (beside and not site.ops.parts(site.layer)):
            continue
        found += [part_site(model, site, name) for name in names]
    if not found:
        raise TargetError(f"target '{entry}[{parts}]': nothing here has such parts.")
    return {site.path: site for site in found}


def _parameters_at(everything: Places, entry: str) -> list[str]:
    """Return the paths of matrices that are parameters of modules without ops and are named outright."""
    path, _, name = entry.rpartition(".")
    if not name:
        return []
    holders = [p for p in everything.modules if not path or p == path or p.endswith("." + path)]
    found = []
    for holder in holders:
        parameter = everything.modules[holder]._parameters.get(name)
        if not is_matrix(parameter):
            continue
        sites = everything.at(holder).values()
        if not sites or (path and any(site.ops.parameter == name for site in sites)):
            found.append(f"{holder}.{name}")
    return found


def _parameter_site(model: nn.Module, path: str) -> dict[str, Site]:
    holder, _, name = path.rpartition(".")
    if not holder or name not in model.get_submodule(holder)._parameters:
        return {}
    site = Site.at(model, path)
    return {site.path: site}


def _refuse(everything: Places, path: str, entry: str) -> None:
    """Say why the module at ``path`` cannot be adapted, and what could be meant.

    Raises:
        TargetError: it holds layers that can be.
        UnsupportedLayerError: it cannot be adapted.
    """
    inside = sorted(
        {site.path.removeprefix(path + ".") for p, site in everything.sites.items() if p.startswith(path + ".")}
    )
    if inside:
        kind = host_class(everything.modules[path]).__name__
        raise TargetError(
            f"target '{entry}' is a {kind} ('{path}') that holds other layers: {quoted(inside)}. Name those."
        )
    ops_for(path, everything.modules[path])
    raise AssertionError("ops_for refuses a layer without ops")


def word_targets(model: nn.Module, everything: Places, word: str) -> dict[str, Site]:
    """Return what a word means here, outside the model's heads, by path; see :mod:`lorakit.adapters.words`."""
    heads = head_paths(model)
    body = {path: site for path, site in everything.sites.items() if not is_below(path, heads)}
    return sites_of_word(word, body, everything.modules)


def head_paths(model: nn.Module) -> list[str]:
    """Return the output heads of a transformers model: its output embedding, and what stands beside its body.

    A model whose body has no name of its own (CLIP's classifier) has heads where a linear layer at its root
    gives as many numbers as there are labels or tokens.
    """
    prefix = getattr(model, "base_model_prefix", None)
    paths: list[str] = []
    if not isinstance(prefix, str):
        return paths
    body = getattr(model, prefix, None) if prefix else None
    if isinstance(body, nn.Module) and body is not model:
        paths += [
            n for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())
        ]
    elif body is None:
        config = getattr(model, "config", None)
        sizes = {getattr(config, name, None) for name in ("num_labels", "vocab_size")}
        linear = {n: child.out_features for n, child in model.named_children() if isinstance(child, nn.Linear)}
        paths += [n for n, size in linear.items() if size in sizes]
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    if isinstance(output, nn.Module):
        paths += [p for p, module in base_modules(model).items() if module is output]
    return sorted(set(paths))


def find_full_modules(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """Return the paths of modules to train in full: exact paths, suffixes, or the word 'head'.

    Raises:
        TargetError: a name matches nothing, or a module without parameters.
    """
    modules = base_modules(model, read=True)
    paths: list[str] = []
    problems: list[str] = []
    for name in as_entries(names):
        hits = [p for p in modules if p == name or p.endswith("." + name)]
        if name == "head":
            hits = head_paths(model) or hits
        hits = [p for p in hits if any(True for _ in modules[p].parameters())]
        if not hits:
            options = {*modules, *(p.rsplit(".", 1)[-1] for p in modules), "head"}
            problems.append(
                f"no module with parameters matches '{name}' to train in full.{did_you_mean(name, options)}"
            )
        paths += [p for p in hits if p not in paths]
    if problems:
        raise TargetError(bullet_list(problems))
    return [p for p in paths if not is_below(p, [q for q in paths if q != p])]


def shortest_names(model: nn.Module, paths: Sequence[str], skip: Sequence[str] = ()) -> list[str]:
    """Return the fewest names that, matched as exact paths or suffixes, mean exactly ``paths``.

    A last component is used where all modules and weights that end so are meant, else the full paths, as of
    a parameter that only its name makes a target.
    """
    by_last: dict[str, list[str]] = {}
    for path in Places.of(model, skip).paths():
        by_last.setdefault(path.rpartition(".")[2], []).append(path)
    wanted = set(paths)
    whole = {PART.sub(r"\g<path>", path) for path in wanted}
    covered: dict[str, bool] = {}  # by the last component: whether it means wanted paths alone
    for last in {path.rpartition(".")[2] for path in wanted}:
        name, brackets, _ = last.partition("[")
        same = by_last.get(name, [])
        meant = {p + last.removeprefix(name) for p in same} if brackets else set(same)
        covered[last] = bool(same) and meant <= wanted and whole.issuperset(same)
    return sorted({last if covered[last := path.rpartition(".")[2]] else path for path in wanted})


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter name, the other names under which the same parameter occurs."""
    groups: dict[int, list[str]] = {}
    for name, parameter in walk_parameters(model, remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {n: [o for o in names if o != n] for names in groups.values() if len(names) > 1 for n in names}


def is_below(path: str, roots: Iterable[str]) -> bool:
    """Tell whether a path is one of ``roots`` or lies below one."""
    return any(path == root or path.startswith(root + ".") for root in roots)
