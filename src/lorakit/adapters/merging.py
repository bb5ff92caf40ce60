"""Merging: the only place that puts other numbers where base weights stand.

The merged weight is ``round(W0 + sum w_i delta_i)``, computed in fp32 (fp64 for an fp64 base) and
rounded once to the weight's dtype. The original parameter objects are kept beside and put back by
unmerging, so that every bit returns and tied weights are tied again; while merged, an adapted weight
that was tied stands alone, unless all its names got the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.adapters.branches import Branch, Branches, Updates, total_difference
from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.host import hosts
from lorakit.adapters.targets import tied_names
from lorakit.errors import AdapterError, MergeError, did_you_mean, quoted
from lorakit.layers import LayerOps, Site
from lorakit.layers.ops import host_class
from lorakit.methods import Update

if TYPE_CHECKING:
    from lorakit.adapters.attachments import Attachments

Place = tuple[nn.Module, str]


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        weights: the strength with which each adapter was merged.
        names: the base tensors that changed, in the model's order.
        untied: those that were tied to another weight and now stand alone.
        originals: what stood there, by module and tensor name; None if nothing was kept.
    """

    weights: dict[str, float]
    names: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    originals: dict[Place, Tensor] | None = None


def delta(handle: Attachments, path: str, name: str) -> Tensor:
    """Return one layer's update as a matrix in fp32, ``[d_out, d_in]``, at strength 1."""
    branches = {p: (host, b) for p, host, b in handle.adapters[name].branches(handle.model, name)}
    known = any(p == path or (isinstance(b, ModuleCopy) and path.startswith(f"{p}.")) for p, (_, b) in branches.items())
    if not known:
        raise AdapterError(f"adapter '{name}' has no update at '{path}'.{did_you_mean(path, branches)}")
    site = Site.at(handle.model, path)
    host, branch = branches.get(path) or branches[site.host]
    if isinstance(branch, Update):
        return branch.terms(site.ops, host).delta(site.matrix())
    own = branch.module.get_parameter(site.ops.parameter).detach()
    return site.ops.as_matrix(host, own.float()) - site.matrix().float()


def merge(handle: Attachments, keep: str) -> Merged:
    """Merge what acts now; see :meth:`Handle.merge`.

    Raises:
        MergeError: nothing acts, or something cannot be merged exactly; nothing has changed then.
    """
    if keep not in ("memory", "none"):
        raise MergeError(f"keep='{keep}': choose 'memory' (unmerge restores every bit) or 'none' (nothing is kept).")
    strengths = {name: handle.active.strength(name) for name in handle.active.weights}
    weights = {name: strength for name, strength in strengths.items() if strength != 0.0}
    _check(handle, weights)
    if keep == "none":  # what is overwritten cannot come back: see first that every value can be held
        for path, host, branches in hosts(handle.model):
            _merged_values(path, host, branches.ops, _acting(branches, weights), weights)
    merged = Merged(weights)
    originals: dict[Place, Tensor] = {}
    ties = tied_names(handle.model)
    try:
        for path, host, branches in list(hosts(handle.model)):
            acting = _acting(branches, weights)
            for (module, key, inner), value in _merged_values(path, host, branches.ops, acting, weights).items():
                name = f"{path}.{inner}"
                merged.names.append(name)
                if name in ties:
                    merged.untied.append(name)
                originals[module, key] = _put(module, key, value, in_place=keep == "none" and name not in ties)
    except BaseException:
        for (module, key), original in originals.items():
            _set(module, key, original)
        raise
    _tie_again(handle.model, merged, ties)
    merged.originals = originals if keep == "memory" else None
    return merged


def _acting(branches: Branches, weights: Mapping[str, float]) -> dict[str, Branch]:
    return {name: branch for name, branch in branches.named().items() if name in weights}


def _tie_again(model: nn.Module, merged: Merged, ties: Mapping[str, list[str]]) -> None:
    """Let weights that were tied be one parameter again where merging gave each of them the same bits."""
    for name in list(merged.untied):
        others = ties[name]
        if name not in merged.untied or not set(others) <= set(merged.untied):
            continue
        if all(torch.equal(model.get_parameter(name), model.get_parameter(other)) for other in others):
            for other in others:
                module, last = _holder(model, other)
                setattr(module, last, model.get_parameter(name))
            merged.untied = [left for left in merged.untied if left not in (name, *others)]


def unmerge(merged: Merged) -> None:
    """Put the original tensors back.

    Raises:
        MergeError: they were not kept.
    """
    if merged.originals is None:
        raise MergeError("the original weights were not kept (keep='none'): load the base again.")
    for (module, key), original in merged.originals.items():
        _set(module, key, original)


def _check(handle: Attachments, weights: Mapping[str, float]) -> None:
    if handle.active.routing is not None:
        raise MergeError(
            "adapters are routed by row now; a merged weight is the same for every row. Leave the routing first."
        )
    if not weights:
        raise MergeError("nothing to merge: no adapter acts. Choose one with use(name) or merge(name).")
    whole = [name for name in weights if handle.adapters[name].parts]
    if whole:
        raise MergeError(f"{quoted(whole)} act on the model as a whole and have no weight to be merged into.")
    for path, host, branches in hosts(handle.model):
        acting = [(name, branch) for name, branch in branches.named().items() if name in weights]
        mixed = len(acting) > 1 or any(weights[name] != 1.0 for name, _ in acting)
        copies = [name for name, branch in acting if isinstance(branch, ModuleCopy) and branch.only is None]
        if copies and mixed and not _linear_in_parameters(host, branches.ops):
            raise MergeError(
                f"'{path}' is trained in full and not linear in its weights: "
                f"merge {quoted(copies)} alone, at strength 1."
            )
        updates = [branch for _, branch in acting if isinstance(branch, Updates)]
        if any(not _is_parameter(host, ops.parameter) for update in updates for ops, _ in update.each()):
            raise MergeError(f"'{path}' computes its weight (a parametrization): it cannot be merged into.")


def _is_parameter(host: nn.Module, name: str) -> bool:
    module, last = _holder(host, name)
    return module._parameters.get(last) is not None


def _linear_in_parameters(host: nn.Module, ops: LayerOps | None) -> bool:
    """Tell whether differences of the parameters add up: a layer with ops, or a norm without statistics."""
    norm = host_class(host).__name__.endswith("Norm") and not any(True for _ in host.buffers(recurse=False))
    return ops is not None or (norm and all(parameter.dim() == 1 for parameter in host.parameters(recurse=False)))


@torch.no_grad()
def _merged_values(
    path: str,
    host: nn.Module,
    ops: LayerOps | None,
    acting: Mapping[str, Branch],
    weights: Mapping[str, float],
) -> dict[tuple[nn.Module, str, str], Tensor]:
    """Return the host's new tensors by holding module, tensor name, and path below the host."""
    sole = next(iter(acting.values())) if len(acting) == 1 and weights[next(iter(acting))] == 1.0 else None
    if isinstance(sole, ModuleCopy):
        values = {key: tensor.detach() for key, tensor in sole.tensors().items()}
        return {(*_holder(host, key), key): _rounded(path, value, _at(host, key)) for key, value in values.items()}
    found = {}
    for key, difference in total_difference(host, acting, {name: weights[name] for name in acting}).items():
        base = _at(host, key)
        found[(*_holder(host, key), key)] = _rounded(path, base.to(difference.dtype) + difference, base)
    return found


def _rounded(path: str, value: Tensor, base: Tensor) -> Tensor:
    rounded = value.to(device=base.device, dtype=base.dtype, copy=True)
    if rounded.is_floating_point() and not bool(rounded.isfinite().all()):
        raise MergeError(
            f"merging '{path}' gives values that {base.dtype} cannot hold. Load the base in a wider dtype."
        )
    return rounded.contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _holder(host: nn.Module, key: str) -> tuple[nn.Module, str]:
    inner, _, last = key.rpartition(".")
    return host.get_submodule(inner), last


def _at(host: nn.Module, key: str) -> Tensor:
    module, last = _holder(host, key)
    tensor = module._parameters.get(last)
    found = tensor if tensor is not None else module._buffers[last]
    assert found is not None
    return found.detach()


def _put(module: nn.Module, key: str, value: Tensor, in_place: bool) -> Tensor:
    """Set a tensor and return what stood there; ``in_place`` overwrites it instead."""
    original = module._parameters.get(key)
    if original is None:
        buffer = module._buffers[key]
        assert buffer is not None
        module._buffers[key] = value
        return buffer
    if in_place and original.shape == value.shape:
        original.data.copy_(value)
    else:  # by setattr: recurrent layers keep a list of their weights, which must follow
        setattr(module, key, nn.Parameter(value, requires_grad=False))
    return original


def _set(module: nn.Module, key: str, original: Tensor) -> None:
    if isinstance(original, nn.Parameter):
        setattr(module, key, original)
    else:
        module._buffers[key] = original
