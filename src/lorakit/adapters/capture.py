"""From a live adapter to plain data and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attached import Counts
from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.state import AdapterState, SiteState
from lorakit.adapters.targets import base_modules, shortest_names
from lorakit.adapters.token_rows import RowsUpdate
from lorakit.adapters.walk import walk_parameters
from lorakit.errors import ShapeError, TargetError, bullet_list, did_you_mean, quoted
from lorakit.layers import Site, sites_of
from lorakit.layers.ops import Runs
from lorakit.layers.site import PART, part_site
from lorakit.methods import Method, Update
from lorakit.methods.method import copy_strictly
from lorakit.methods.shared import Shared, SharingUpdate

if TYPE_CHECKING:
    from lorakit.adapters.attachments import Attachments


def capture(handle: Attachments, name: str) -> AdapterState:
    """Return an adapter as plain data: detached copies on the CPU, in the adapter's own dtype."""
    entry = handle.adapters[name]
    sites: dict[str, SiteState] = {}
    order: dict[str, tuple[int, int]] = {}
    biases: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, SiteState] = {}
    written: set[int] = set()
    hosts: dict[int, int] = {}
    for path, host, branch in entry.branches(handle.model, name):
        tensors = {key: _plain(tensor) for key, tensor in branch.tensors().items()}
        if isinstance(branch, ModuleCopy) and branch.only is None:
            modules[path] = tensors
            continue
        if isinstance(branch, RowsUpdate):
            if id(branch.rows) not in written:
                rows[path] = _rows_state(Site.at(handle.model, path), tensors)
            written.add(id(branch.rows))
            continue
        if "bias" in tensors:
            biases[path] = tensors.pop("bias")
        if tensors:
            site = Site.at(handle.model, path)
            shape = tuple(site.ops.weight(host).shape)
            sites[path] = SiteState(site.ops.kind, shape, tensors, site.runs, _options(site))
            order[path] = hosts.setdefault(id(host), len(hosts)), _position(host, site.ops.parameter)
    parts = {
        key: {inner: _plain(tensor) for inner, tensor in part.state_dict().items()} for key, part in entry.parts.items()
    }
    updates = {path: branch for path, _, branch in entry.branches(handle.model, name) if isinstance(branch, Update)}
    targets = entry.targets
    if sites.keys() != entry.sites.keys():  # an update that has come to nothing is not saved
        targets = tuple(shortest_names(handle.model, [p for p in entry.sites if p in sites], entry.full_modules))
    return AdapterState(
        method=entry.method.finished(updates),
        sites={path: sites[path] for path in sorted(sites, key=lambda path: order[path])},
        biases=biases,
        modules=modules,
        rows=rows,
        parts=parts,
        shared={key: _plain(tensor) for one in shared_of(updates)[:1] for key, tensor in one.tensors().items()},
        targets=targets,
        full_modules=entry.full_modules,
        identity=handle.identity(name),
    )


def shared_of(updates: Mapping[str, Update]) -> list[Shared]:
    """Return what an adapter's updates share, once for each device."""
    found = {id(update.shared): update.shared for update in updates.values() if isinstance(update, SharingUpdate)}
    return list(found.values())


def _rows_state(site: Site, tensors: dict[str, Tensor]) -> SiteState:
    shape = tuple(site.ops.weight(site.layer).shape)
    biased = {} if site.ops.bias(site.layer) is None else {"bias": True}
    return SiteState(site.ops.kind, shape, tensors, site.runs, biased)


def _position(host: nn.Module, parameter: str) -> int:
    """Return the place of a parameter among its module's own; those of modules below it come last."""
    names = list(host._parameters)
    return names.index(parameter) if parameter in names else len(names)


def _options(site: Site) -> dict[str, Any]:
    """Return the options of a layer that decide what its matrix means and that its kind does not say."""
    layer = site.layer
    if isinstance(layer, nn.modules.conv._ConvNd):
        plain = {"groups": 1, "dilation": (1,) * len(layer.kernel_size), "padding_mode": "zeros"}
        found = {"groups": layer.groups, "dilation": tuple(layer.dilation), "padding_mode": layer.padding_mode}
        return {name: value for name, value in found.items() if value != plain[name]}
    if site.ops.kind in ("experts", "parameter") and site.ops.matrix_shape(layer, (1, 2))[1] == 1:
        return {"transposed": True}
    return {}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def counts(handle: Attachments, name: str) -> Counts:
    """Count an adapter's trained numbers, tied copies once, and the base's."""
    entry = handle.adapters[name]
    updates = sum(p.numel() for part in entry.parts.values() for p in part.parameters())
    full: dict[int, int] = {}
    rows: dict[int, int] = {}  # by parameter: of tied tables there is one
    for _, _, branch in entry.branches(handle.model, name):
        if isinstance(branch, ModuleCopy):
            full.update({id(p): p.numel() for p in branch.own_parameters().values()})
        elif isinstance(branch, RowsUpdate):
            rows[id(branch.rows)] = branch.rows.numel()
        else:
            updates += sum(p.numel() for p in branch.parameters())
    base = sum(p.numel() for _, p in walk_parameters(handle.model))
    return Counts(updates + sum(rows.values()), sum(full.values()), base)


def dtype_of(state: AdapterState) -> torch.dtype:
    """Return the one dtype of an adapter's tensors: the widest that occurs, fp32 where there are none."""
    groups = [
        *(site.tensors for site in (*state.sites.values(), *state.rows.values())),
        *state.modules.values(),
        *state.parts.values(),
        state.biases,
    ]
    found = [t.dtype for group in groups for t in group.values() if t.is_floating_point()]
    return functools.reduce(torch.promote_types, found) if found else torch.float32


Places = dict[str, tuple[str, str]]


def places(model: nn.Module, state: AdapterState) -> tuple[list[Site], dict[str, nn.Module], Places]:
    """Find a saved adapter's sites, modules trained in full, and further biases in a model.

    Raises:
        TargetError: the model lacks some of them.
        ShapeError: a layer is of another kind or size, or a fused projection is split otherwise.
    """
    modules = base_modules(model)
    known = {path: site for name, module in modules.items() for path, site in sites_of(name, module).items()}
    found: dict[str, Site] = {}
    missing: list[str] = []
    for path in (*state.sites, *state.biases):
        site = _site(model, path, state.sites[path].runs if path in state.sites else None, known, modules)
        if site is not None:
            found[path] = site
        elif path not in modules or path in state.sites:
            missing.append(path)
    missing += [path for path in state.modules if path not in modules]
    if missing:
        names = {*modules, *known}
        lines = [f"the adapter has a layer '{p}' that this model lacks.{did_you_mean(p, names)}" for p in missing[:8]]
        raise TargetError(bullet_list(lines))
    problems = [problem for path in state.sites if (problem := _misfit(found[path], state.sites[path])) is not None]
    if problems:
        raise ShapeError(bullet_list(problems[:8]))
    order = {path: i for i, path in enumerate(modules)}
    sites = sorted((found[path] for path in state.sites), key=lambda site: order[site.host])
    leaves = {path: modules[path] for path in modules if path in state.modules}
    others = [path for path in state.biases if path not in state.sites]
    biases = {path: (found[path].host, found[path].place) if path in found else (path, "") for path in others}
    return sites, leaves, biases


def _site(
    model: nn.Module, path: str, runs: Runs | None, known: Mapping[str, Site], modules: Mapping[str, nn.Module]
) -> Site | None:
    """Return the site at a saved path, or None where the model has no such layer or weight."""
    if path in known:
        return known[path]
    part = PART.fullmatch(path)
    whole = path if part is None else part["path"]
    if whole not in known:
        host, _, name = whole.rpartition(".")
        layer = modules.get(host) if host else model
        if layer is None or name not in layer._parameters:
            return None
    if part is None:
        return Site.at(model, path)
    split = part_site(model, known.get(whole) or Site.at(model, whole), part["parts"])
    if runs is not None and split.runs != runs:
        raise ShapeError(
            f"the adapter belongs to another split of '{whole}': its part '{part['parts']}' is rows "
            f"{_rows(runs)}, here {_rows(split.runs)}."
        )
    return split


def _rows(runs: Runs | None) -> str:
    if runs is None:
        return "all rows"
    shown = ", ".join(f"{start}:{stop}" for start, stop in runs[:3])
    return shown + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


# What a file may call one of the other: only the model tells them apart.
_ALIKE = ({"linear", "transposed"}, {"embedding", "scaled_embedding"}, {"experts", "parameter"})


def _misfit(site: Site, saved: SiteState) -> str | None:
    if site.ops.kind != saved.kind and not any({site.ops.kind, saved.kind} <= kinds for kinds in _ALIKE):
        return f"'{site.path}' is of kind {site.ops.kind} here, but {saved.kind} in the adapter"
    shape = tuple(site.ops.weight(site.layer).shape)
    native = len(saved.weight_shape) > 2  # a file may know no more than (d_out, d_in)
    if native and len(shape) > 2 and shape[1:] != tuple(saved.weight_shape)[1:]:
        return f"'{site.path}' has a weight of shape {shape} here, {tuple(saved.weight_shape)} in the adapter"
    A, B = saved.tensors.get("A"), saved.tensors.get("B")
    if A is not None and B is not None and (B.shape[-2], A.shape[-1]) != (site.d_out, site.d_in):
        if site.ops.input_is_index and B.shape[-2] == site.d_out:
            return (
                f"'{site.path}' has {site.d_in} tokens here, but {A.shape[-1]} in the adapter: "
                f"call model.resize_token_embeddings({A.shape[-1]}) first"
            )
        return f"'{site.path}' is {site.d_out} x {site.d_in} here, but {B.shape[-2]} x {A.shape[-1]} in the adapter"
    return None


def fill(handle: Attachments, name: str, state: AdapterState) -> None:
    """Copy a saved adapter's tensors into the live one, bit for bit and strictly.

    Raises:
        ShapeError: tensors are missing, left over, or of another shape.
    """
    problems: list[str] = []
    entry = handle.adapters[name]
    filled: set[int] = set()
    branches = [(path, branch) for path, _, branch in entry.branches(handle.model, name)]
    for path, branch in branches:
        if isinstance(branch, RowsUpdate):
            if path in state.rows or id(branch.rows) not in filled:
                saved = state.rows[path].tensors if path in state.rows else {}
                problems += [f"'{path}': {problem}" for problem in branch.load(saved)]
            filled.add(id(branch.rows))
            continue
        given = dict(state.sites[path].tensors) if path in state.sites and isinstance(branch, Update) else {}
        runs = state.sites[path].runs if path in state.sites else None
        if runs is not None and (own := Site.at(handle.model, path).runs) != runs:
            problems.append(f"'{path}' is rows {_rows(own)} here, but {_rows(runs)} in the adapter: another split")
            continue
        if path in state.biases:
            given["bias"] = state.biases[path]
        if path in state.modules:
            given = dict(state.modules[path])
        found = branch.load(given) if isinstance(branch, Update) else copy_strictly(branch.tensors(), given)
        problems += [f"'{path}': {problem}" for problem in found]
    updates = {path: branch for path, branch in branches if isinstance(branch, Update)}
    problems += _fill_shared(entry.method, updates, state)
    for key, part in entry.parts.items():
        found = copy_strictly(part.state_dict(keep_vars=True), dict(state.parts.get(key, {})))
        problems += [f"'{key}': {problem}" for problem in found]
    if problems:
        raise ShapeError(bullet_list(problems[:8]))


def _fill_shared(method: Method, updates: Mapping[str, Update], state: AdapterState) -> list[str]:
    """Take a saved adapter's shared tensors; without any, those that were drawn must be its own."""
    own = shared_of(updates)
    if state.shared or not own:
        stray = [] if own or not state.shared else [f"shared tensors {quoted(list(state.shared))} have no place here"]
        return stray + [problem for shared in own for problem in shared.load(state.shared)]
    if method.finished(updates) != state.method:
        return ["the adapter's shared tensors are not there, and these were drawn from another seed"]
    return []
