"""From a live adapter to plain data and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.adapters.attached import Counts
from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.host import base_parameters
from lorakit.adapters.state import AdapterState, SiteState
from lorakit.adapters.targets import base_modules
from lorakit.errors import ShapeError, TargetError, bullet_list, did_you_mean
from lorakit.layers import Site
from lorakit.methods import Update

if TYPE_CHECKING:
    from lorakit.adapters.attachments import Attachments


def capture(handle: Attachments, name: str) -> AdapterState:
    """Return an adapter as plain data: detached copies on the CPU, in the adapter's own dtype."""
    entry = handle.adapters[name]
    sites: dict[str, SiteState] = {}
    biases: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for path, host, branch in entry.branches(handle.model, name):
        tensors = {key: _plain(tensor) for key, tensor in branch.tensors().items()}
        if isinstance(branch, ModuleCopy) and branch.only is None:
            modules[path] = tensors
            continue
        if "bias" in tensors:
            biases[path] = tensors.pop("bias")
        if tensors:
            site = Site.at(handle.model, path)
            sites[path] = SiteState(site.ops.kind, tuple(site.ops.weight(host).shape), tensors)
    parts = {
        key: {inner: _plain(tensor) for inner, tensor in part.state_dict().items()} for key, part in entry.parts.items()
    }
    return AdapterState(
        method=entry.method,
        sites=sites,
        biases=biases,
        modules=modules,
        parts=parts,
        targets=entry.targets,
        full_modules=entry.full_modules,
        identity=handle.identity(name),
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def counts(handle: Attachments, name: str) -> Counts:
    """Count an adapter's trained numbers, tied copies once, and the base's."""
    entry = handle.adapters[name]
    updates = sum(p.numel() for part in entry.parts.values() for p in part.parameters())
    full: dict[int, int] = {}
    for _, _, branch in entry.branches(handle.model, name):
        if isinstance(branch, ModuleCopy):
            full.update({id(p): p.numel() for p in branch.own_parameters().values()})
        else:
            updates += sum(p.numel() for p in branch.parameters())
    return Counts(updates, sum(full.values()), sum(p.numel() for _, p in base_parameters(handle.model)))


def dtype_of(state: AdapterState) -> torch.dtype:
    """Return the one dtype of an adapter's tensors: the widest that occurs, fp32 where there are none."""
    groups = [
        *(site.tensors for site in state.sites.values()),
        *state.modules.values(),
        *state.parts.values(),
        state.biases,
    ]
    found = [t.dtype for group in groups for t in group.values() if t.is_floating_point()]
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def places(model: nn.Module, state: AdapterState) -> tuple[list[Site], dict[str, nn.Module], list[str]]:
    """Find a saved adapter's sites, modules trained in full, and further biases in a model.

    Raises:
        TargetError: the model lacks some of them.
        ShapeError: a layer is of another kind or size.
    """
    modules = base_modules(model)
    wanted = [*state.sites, *state.modules, *state.biases]
    missing = [path for path in dict.fromkeys(wanted) if path not in modules]
    if missing:
        raise TargetError(
            bullet_list(
                [f"the adapter has a layer '{p}' that this model lacks.{did_you_mean(p, modules)}" for p in missing[:8]]
            )
        )
    sites = [Site.at(model, path) for path in modules if path in state.sites]
    problems = [problem for site in sites if (problem := _misfit(site, state.sites[site.path])) is not None]
    if problems:
        raise ShapeError(bullet_list(problems[:8]))
    leaves = {path: modules[path] for path in modules if path in state.modules}
    biases = [path for path in state.biases if path not in state.sites]
    return sites, leaves, biases


def _misfit(site: Site, saved: SiteState) -> str | None:
    linear = {"linear", "transposed"}
    if site.ops.kind != saved.kind and not {site.ops.kind, saved.kind} <= linear:
        return f"'{site.path}' is of kind {site.ops.kind} here, but {saved.kind} in the adapter"
    shape = tuple(site.ops.weight(site.layer).shape)
    if len(shape) > 2 and shape[1:] != tuple(saved.weight_shape)[1:]:
        return f"'{site.path}' has a weight of shape {shape} here, {tuple(saved.weight_shape)} in the adapter"
    A, B = saved.tensors.get("A"), saved.tensors.get("B")
    if A is not None and B is not None and (B.shape[0], A.shape[1]) != (site.d_out, site.d_in):
        return f"'{site.path}' is {site.d_out} x {site.d_in} here, but {B.shape[0]} x {A.shape[1]} in the adapter"
    return None


def fill(handle: Attachments, name: str, state: AdapterState) -> None:
    """Copy a saved adapter's tensors into the live one, bit for bit and strictly.

    Raises:
        ShapeError: tensors are missing, left over, or of another shape.
    """
    problems: list[str] = []
    entry = handle.adapters[name]
    for path, _, branch in entry.branches(handle.model, name):
        given = dict(state.sites[path].tensors) if path in state.sites and isinstance(branch, Update) else {}
        if path in state.biases:
            given["bias"] = state.biases[path]
        if path in state.modules:
            given = dict(state.modules[path])
        problems += _copy_into(path, branch.tensors(), given)
    for key, part in entry.parts.items():
        problems += _copy_into(key, part.state_dict(keep_vars=True), dict(state.parts.get(key, {})))
    if problems:
        raise ShapeError(bullet_list(problems[:8]))


@torch.no_grad()
def _copy_into(path: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key in sorted({*own, *given}):
        if key not in given:
            problems.append(f"'{path}': the adapter has no tensor '{key}'")
        elif key not in own:
            problems.append(f"'{path}': tensor '{key}' has no place here")
        elif own[key].shape != given[key].shape:
            found, expected = tuple(given[key].shape), tuple(own[key].shape)
            problems.append(f"'{path}': tensor '{key}' is {found} in the adapter, {expected} here")
        else:
            own[key].copy_(given[key])
    return problems
