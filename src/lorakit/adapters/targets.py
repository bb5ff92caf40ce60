"""Which layers an adapter acts on: names, suffixes, globs, regular expressions and words.

An entry is one of

    attention, mlp, all-linear      a word
    re:PATTERN                      a regular expression that must match the whole path
    a path with * ? or [            a glob over the whole path
    anything else                   an exact path, or a suffix of it after a dot

Every entry must match something that can be adapted, also when other entries do.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.adapters.host import base_parameters
from lorakit.errors import InputError, TargetError, UnsupportedLayerError, bullet_list, did_you_mean, quoted
from lorakit.layers import Site, find_ops, ops_for
from lorakit.layers.ops import host_class

WORDS = ("attention", "mlp", "all-linear")
Layers = str | int | range | Sequence[int]


@dataclass(frozen=True)
class Coverage:
    """How many of the base's matrix parameters the targets are.

    Attributes:
        reached: numbers in the targets' weights.
        total: numbers in all parameters of two or more dimensions.
        unreached: the others by module path, largest first.
    """

    reached: int
    total: int
    unreached: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Say the share in a sentence."""
        share = 100.0 * self.reached / max(self.total, 1)
        text = f"{share:.1f} % of {self.total:,} matrix parameters"
        if self.unreached:
            rest = ", ".join(f"{path} ({count:,})" for path, count in self.unreached[:4])
            more = len(self.unreached) - 4
            text += f"; not: {rest}" + (f" and {more} more" if more > 0 else "")
        return text


def as_entries(value: str | Iterable[str] | None) -> list[str]:
    """Return a list of entries from one, several in a comma-separated string, or a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value] if value.startswith("re:") else [part.strip() for part in value.split(",") if part.strip()]
    return list(value)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base's modules by path, without the root and what attaching added."""
    return {p: m for p, m in model.named_modules() if p and "lorakit" not in p.split(".")}


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
    modules = {p: m for p, m in base_modules(model).items() if not _below(p, skip)}
    problems: list[str] = []
    chosen: set[str] = set()
    dropped: set[str] = set()
    unsupported: list[str] = []
    for entry in as_entries(targets):
        try:
            chosen |= _match(model, modules, entry, strict=True)
        except UnsupportedLayerError as error:
            unsupported.append(str(error))
        except InputError as error:
            problems.append(str(error))
    for entry in as_entries(exclude):
        try:
            dropped |= _match(model, modules, entry, strict=False)
        except InputError as error:
            problems.append(f"exclude: {error}")
    if problems:
        raise TargetError(bullet_list([*problems, *unsupported]))
    if unsupported:
        raise UnsupportedLayerError(bullet_list(unsupported))
    keep = _layer_filter(layers, modules)
    paths = [p for p in modules if p in chosen and not _below(p, dropped) and keep(p)]
    if not paths:
        raise TargetError("no target is left after excludes and the range of layers.")
    refuse_read_by_parent(model, paths)
    return [Site.at(model, path) for path in paths]


def refuse_read_by_parent(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers below a module that reads its layers' weights itself, so that an update would be skipped.

    Raises:
        UnsupportedLayerError: naming every such layer.
    """
    problems = []
    for path in paths:
        parent_path, _, _ = path.rpartition(".")
        while parent_path:
            parent = model.get_submodule(parent_path)
            if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
                problems.append(
                    f"layer '{path}' belongs to a {host_class(parent).__name__} ('{parent_path}'), which reads its "
                    "layers' weights itself: an update there would be skipped. It cannot be adapted."
                )
                break
            parent_path, _, _ = parent_path.rpartition(".")
    if problems:
        raise UnsupportedLayerError(bullet_list(problems))


def _match(model: nn.Module, modules: dict[str, nn.Module], entry: str, strict: bool) -> set[str]:
    """Return the adaptable paths that one entry names."""
    if entry in WORDS:
        found = word_targets(model, modules, entry)
        if not found:
            raise TargetError(f"no layer matches the word '{entry}': this model has no such linear layers by name.")
        return found
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise TargetError(f"target '{entry}' is not a regular expression: {error}.") from None
        hits = {p for p in modules if pattern.fullmatch(p)}
    elif any(sign in entry for sign in "*?["):
        hits = {p for p in modules if fnmatch.fnmatchcase(p, entry)}
    else:
        hits = {p for p in modules if p == entry or p.endswith("." + entry)}
        if hits and strict:
            return {_adaptable(modules, p, entry) for p in sorted(hits)}
    usable = {p for p in hits if find_ops(modules[p]) is not None}
    if hits and not usable and strict:
        for path in sorted(hits):
            _adaptable(modules, path, entry)
    if not hits:
        names = {p for p, m in modules.items() if find_ops(m) is not None}
        last = {p.rsplit(".", 1)[-1] for p in names}
        near = did_you_mean(entry, names | last | set(WORDS)) or f" Layers here: {quoted(sorted(last))}."
        raise TargetError(f"no layer matches target '{entry}'.{near} See `lorakit inspect MODEL`.")
    return usable or hits


def _adaptable(modules: dict[str, nn.Module], path: str, entry: str) -> str:
    """Return ``path`` if it can be adapted, else raise with what could be meant."""
    if find_ops(modules[path]) is not None:
        return path
    inside = [p for p, m in modules.items() if p.startswith(path + ".") and find_ops(m) is not None]
    if inside:
        names = sorted({p.removeprefix(path + ".") for p in inside})
        kind = host_class(modules[path]).__name__
        raise TargetError(
            f"target '{entry}' is a {kind} ('{path}') that holds other layers: {quoted(names)}. Name those."
        )
    ops_for(path, modules[path])
    raise AssertionError("ops_for refuses a layer without ops")


def word_targets(model: nn.Module, modules: dict[str, nn.Module], word: str) -> set[str]:
    """Return what a word means here: linear layers outside heads and routers, by place.

    ``attention`` are those with 'attn' or 'attention' in a part of their path, ``mlp`` the others of
    the numbered blocks, ``all-linear`` all of them.
    """
    heads = head_paths(model)
    found = set()
    for path, module in modules.items():
        ops = find_ops(module)
        if ops is None or not ops.matrix_input or _below(path, heads) or _is_router(path):
            continue
        parts = path.lower().split(".")
        in_attention = any("attn" in part or "attention" in part for part in parts)
        in_block = any(part.isdigit() for part in parts)
        if word == "all-linear" or ((word == "attention") == in_attention and (in_block or in_attention)):
            found.add(path)
    return found


def head_paths(model: nn.Module) -> list[str]:
    """Return the output heads of a transformers model: its output embedding, and what stands beside its body."""
    prefix = getattr(model, "base_model_prefix", None)
    paths: list[str] = []
    if not isinstance(prefix, str):
        return paths
    body = getattr(model, prefix, None) if prefix else None
    if isinstance(body, nn.Module) and body is not model:
        paths += [
            n for n, child in model.named_children() if child is not body and any(True for _ in child.parameters())
        ]
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
    modules = base_modules(model)
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
    return [p for p in paths if not _below(p, [q for q in paths if q != p])]


def coverage(model: nn.Module, sites: Sequence[Site], full: Sequence[str] = ()) -> Coverage:
    """Count which matrix parameters of the base are reached by ``sites`` or trained in full."""
    reached_names = {f"{site.path}.weight" for site in sites}
    reached = total = 0
    missed: dict[str, int] = {}
    for name, parameter in base_parameters(model):
        if parameter.dim() < 2:
            continue
        total += parameter.numel()
        path = name.rpartition(".")[0]
        if name in reached_names or _below(path, full):
            reached += parameter.numel()
        else:
            missed[path] = missed.get(path, 0) + parameter.numel()
    ordered = sorted(missed.items(), key=lambda item: (-item[1], item[0]))
    return Coverage(reached, total, tuple(ordered))


def shortest_names(model: nn.Module, paths: Sequence[str], skip: Sequence[str] = ()) -> list[str]:
    """Return the fewest names that, matched as exact paths or suffixes, mean exactly ``paths``.

    A last component is used where all modules that end so are meant, else the full paths.
    """
    everything = [p for p in base_modules(model) if not _below(p, skip)]
    wanted = set(paths)
    names: set[str] = set()
    for path in paths:
        last = path.rsplit(".", 1)[-1]
        same = {p for p in everything if p == last or p.endswith("." + last)}
        names.add(last if same <= wanted else path)
    return sorted(names)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter name, the other names under which the same parameter occurs."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lorakit" not in name.split("."):
            groups.setdefault(id(parameter), []).append(name)
    return {n: [o for o in names if o != n] for names in groups.values() if len(names) > 1 for n in names}


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _is_router(path: str) -> bool:
    return path.rsplit(".", 1)[-1] in ("gate", "router", "shared_expert_gate")


def _layer_filter(layers: Layers | None, modules: dict[str, nn.Module]) -> Callable[[str], bool]:
    if layers is None:
        return lambda path: True
    present = sorted({number for p in modules if (number := block_number(p)) is not None})
    if not present:
        raise TargetError(f"layers {layers!r}: this model's paths have no block numbers.")
    wanted = _parse_layers(layers, present)
    missing = sorted(wanted - set(present))
    if missing or not wanted:
        raise TargetError(
            f"layers {layers!r}: no block {missing or 'at all'}; this model has {present[0]} to {present[-1]}."
        )
    return lambda path: block_number(path) in wanted


def _parse_layers(layers: Layers, present: Sequence[int]) -> set[int]:
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, str):
        return {number if number >= 0 else present[-1] + 1 + number for number in layers}
    wanted: set[int] = set()
    for part in layers.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        last = re.fullmatch(r"last:(\d+)", part)
        if span and int(span[1]) <= int(span[2] or span[1]):
            wanted |= set(range(int(span[1]), int(span[2] or span[1]) + 1))
        elif last and 0 < int(last[1]) <= len(present):
            wanted |= set(present[-int(last[1]) :])
        elif span or last:
            raise TargetError(
                f"layers '{layers}': '{part}' means no such blocks; this model has {present[0]} to {present[-1]}."
            )
        else:
            raise TargetError(f"layers '{layers}': '{part}' is not understood. Write '0-5', '3', '0-2,7' or 'last:4'.")
    return wanted


def block_number(path: str) -> int | None:
    """Return the number of the block a path lies in: its first component that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
