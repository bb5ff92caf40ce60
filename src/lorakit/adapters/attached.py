"""``Attached``: what one adapter has put into a model, and the putting in itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorakit.adapters.branches import Active, Branches, Updates
from lorakit.adapters.copies import ModuleCopy, leaf_modules, pristine_copy
from lorakit.adapters.host import Adapted, adapt, unadapt, wanted_mode
from lorakit.adapters.targets import Places, is_below, refuse_read_by_parent, tied_names
from lorakit.adapters.walk import module_at, walk_parameters
from lorakit.errors import ConfigError, TargetError, UnsupportedLayerError, bullet_list, quoted
from lorakit.layers import Site, find_ops, sites_of
from lorakit.methods import Method, ModelPart, Update
from lorakit.methods.method import BiasUpdate


@dataclass(frozen=True)
class Counts:
    """How many numbers an adapter has.

    Attributes:
        updates: in the method's updates and parts, and in rows of tokens.
        full: in modules trained in full (heads, embeddings, norms).
        base: in the base model, each tied parameter once.
    """

    updates: int
    full: int
    base: int

    @property
    def trained(self) -> int:
        """All numbers that belong to the adapter."""
        return self.updates + self.full

    @property
    def percent(self) -> float:
        """The adapter's numbers in percent of the base's."""
        return 100.0 * self.trained / max(self.base, 1)

    def __str__(self) -> str:
        """Say the counts in a sentence."""
        full = f" (of these {self.full:,} in modules trained in full)" if self.full else ""
        return f"{self.trained:,} trained numbers{full}, {self.percent:.3f} % of the base's {self.base:,}"


@dataclass
class Attached:
    """One adapter's place in a model.

    Attributes:
        method: its method.
        sites: host and place by path of every update, in the model's order.
        biases: the same of other weights, of which only the bias is trained; a module without ops has the place ''.
        rows: the same of rows of tokens that are trained whole.
        copies: modules that hold parameters and are trained in full, by path.
        full_modules: the modules trained in full, as chosen.
        new_modules: modules of the base that a checkpoint did not hold.
        targets: the shortest names that mean ``paths``.
        dtype: the dtype of its parameters.
        parts: parts that act on the model as a whole.
        hooks: their hooks.
    """

    method: Method
    sites: dict[str, tuple[str, str]]
    biases: dict[str, tuple[str, str]]
    rows: dict[str, tuple[str, str]]
    copies: tuple[str, ...]
    full_modules: tuple[str, ...]
    new_modules: tuple[str, ...]
    targets: tuple[str, ...]
    dtype: torch.dtype
    parts: dict[str, ModelPart] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all updates."""
        return tuple(self.sites)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The paths of all hosts, each once."""
        places = (*self.sites.values(), *self.biases.values(), *self.rows.values())
        return tuple(dict.fromkeys([*(host for host, _ in places), *self.copies]))

    def branches(self, model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Update | ModuleCopy]]:
        """Yield path, host and this adapter's branch of every update, trained bias, rows and module in full."""
        for path, (host_path, place) in (*self.sites.items(), *self.biases.items(), *self.rows.items()):
            host = module_at(model, host_path)
            branch = _branches_of(host).named()[name]
            yield path, host, branch.at(place) if isinstance(branch, Updates) else branch
        for path in self.copies:
            host = module_at(model, path)
            branch = _branches_of(host).named()[name]
            assert isinstance(branch, ModuleCopy)
            yield path, host, branch


def _branches_of(host: nn.Module) -> Branches:
    assert isinstance(host, Adapted)
    return host.lorakit


def plan_biases(
    model: nn.Module, sites: Sequence[Site], wanted: str, skip: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Return where, beside the sites, the adapter trains a bias ('all'): host and place by path.

    Raises:
        ConfigError: biases are asked for and no layer has one.
        UnsupportedLayerError: 'all', and a layer's bias is not simply added to its output, or only some of its
            rows are targets.
    """
    if wanted == "none":
        return {}
    own = [site.path for site in sites if site.ops.bias(site.layer) is not None]
    if wanted == "lora_only":
        if not own:
            raise ConfigError("bias='lora_only': none of the targets has a bias. Use bias='none'.")
        return {}
    rows: dict[tuple[str, str], int] = {}
    for site in sites:
        key = site.host, site.ops.parameter
        rows[key] = rows.get(key, 0) + site.d_out
    others: dict[str, tuple[str, str]] = {}
    refused: list[str] = []
    for path, module in Places.of(model, skip).modules.items():
        own_names = [n for n, _ in module.named_parameters(recurse=False) if "bias" in n]
        found = sites_of(path, module)
        if found:
            for site in found.values():
                taken = rows.get((path, site.ops.parameter), 0)
                if site.ops.bias(module) is None or taken == site.d_out:
                    continue
                if taken:
                    refused.append(f"'{site.path}' (of which only some rows are targets)")
                else:
                    others[site.path] = (path, site.place)
        elif own_names == ["bias"] and _only_vectors(module):
            others[path] = (path, "")
        elif own_names:
            refused.append(f"'{path}' ({type(module).__name__}: {', '.join(own_names)})")
    if refused:
        raise UnsupportedLayerError(f"bias='all' cannot train the biases of {'; '.join(refused)}. Use 'lora_only'.")
    if not own and not others:
        raise ConfigError("bias='all': this model has no biases. Use bias='none'.")
    return others


def _only_vectors(module: nn.Module) -> bool:
    children = [name for name, _ in module.named_children() if name != "lorakit"]
    return not children and all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))


def plan_copies(model: nn.Module, full: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules to copy for ``full``, by path.

    Raises:
        TargetError: a parameter of theirs is tied to a module that is not trained in full with it.
        UnsupportedLayerError: a parent reads a module's weights itself and would never run its copy.
    """
    leaves: dict[str, nn.Module] = {}
    for path in full:
        leaves.update(leaf_modules(model, path))
    refuse_read_by_parent(model, leaves)
    mine = {
        f"{path}.{n}" for path, module in leaves.items() for n, _ in module.named_parameters(remove_duplicate=False)
    }
    problems = [
        f"'{name}' is tied to {quoted([o for o in others if o not in mine])}: training it in full would leave "
        f"{'that' if len(others) == 1 else 'those'} behind. Name both to train them together, or adapt it by "
        "a target instead"
        for name, others in tied_names(model).items()
        if name in mine and any(other not in mine for other in others)
    ]
    if problems:
        raise TargetError(bullet_list(problems))
    return leaves


def install_updates(
    model: nn.Module, name: str, active: Active, sites: Iterable[Site], updates: Mapping[str, Update]
) -> None:
    """Put updates into their hosts. Changes the hosts' class."""
    for site in sites:
        if site.path in updates:
            update = updates[site.path].train(site.layer.training)
            branches = adapt(site.host, site.layer, find_ops(site.layer) or site.ops, active)
            branches.put_update(name, site.place, site.ops, update)


def install_biases(
    model: nn.Module, name: str, active: Active, places: Mapping[str, tuple[str, str]], dtype: torch.dtype
) -> None:
    """Give the layers at ``places`` the adapter's own copy of their bias. Changes the hosts' class."""
    for path, (host, place) in places.items():
        module = model.get_submodule(host)
        if place:
            site = Site.at(model, path)
            bias = site.ops.bias(module)
            assert bias is not None
            adapt(host, module, find_ops(module), active).put_update(name, place, site.ops, BiasUpdate(bias, dtype))
        else:
            copy = ModuleCopy(pristine_copy(module), dtype, frozenset({"bias"}))
            adapt(path, module, None, active).put(name, copy.train(wanted_mode(module)))


def install_copies(
    model: nn.Module, name: str, active: Active, leaves: Mapping[str, nn.Module], dtype: torch.dtype
) -> None:
    """Give each module its own trained copy; copies of tied parameters stay tied. Changes the hosts' class."""
    made: dict[str, nn.Parameter] = {}
    ties = tied_names(model)
    for path, module in leaves.items():
        copy = ModuleCopy(pristine_copy(module), dtype)
        for inner, parameter in list(copy.module.named_parameters()):
            full_name = f"{path}.{inner}"
            twin = next((made[other] for other in ties.get(full_name, []) if other in made), None)
            if twin is None:
                made[full_name] = parameter
            else:
                holder, _, last = inner.rpartition(".")
                copy.module.get_submodule(holder)._parameters[last] = twin
        adapt(path, module, find_ops(module), active).put(name, copy.train(wanted_mode(module)))


def install_parts(model: nn.Module, name: str, active: Active, entry: Attached) -> None:
    """Put parts that act on the whole model into a child of the root called ``lorakit`` and hook them in.

    Raises:
        UnsupportedLayerError: the root runs its children in order, so that a child would become a layer.
    """
    if not entry.parts:
        return
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        kind = type(model).__name__
        raise UnsupportedLayerError(f"a {kind} as root cannot take a part of its own; put it inside a module.")
    if "lorakit" not in model._modules:
        model.add_module("lorakit", nn.ModuleDict())
    root = model._modules["lorakit"]
    assert root is not None
    box = root._modules[name] = nn.Module()
    for key, part in entry.parts.items():
        part.bind(name, active)
        box.add_module(key, part)
        entry.hooks += part.install(model)


def uninstall(model: nn.Module, name: str, entry: Attached) -> None:
    """Take everything of one adapter out of a model again, also where only some of it had been put in."""
    for path in entry.hosts:
        host = module_at(model, path)
        if not isinstance(host, Adapted):
            continue
        branches = host.lorakit
        if name in branches.named():
            branches.drop(name)
        if not branches.named():
            unadapt(host)
    for hook in entry.hooks:
        hook.remove()
    root = model._modules.get("lorakit")
    if root is not None and entry.parts:
        root._modules.pop(name, None)
        if not root._modules:  # the last to go takes the child with it
            del model._modules["lorakit"]


def parameters_of(model: nn.Module, name: str, entry: Attached) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by ``path.tensor``, tied copies once."""
    found: dict[str, nn.Parameter] = {}
    for path, _, branch in entry.branches(model, name):
        own = branch.own_parameters() if isinstance(branch, ModuleCopy) else dict(branch.named_parameters())
        found.update({f"{path}.{inner}": parameter for inner, parameter in own.items()})
    for key, part in entry.parts.items():
        found.update({f"{key}.{inner}": parameter for inner, parameter in part.named_parameters()})
    first = {id(parameter): key for key, parameter in reversed(found.items())}
    return {key: parameter for key, parameter in found.items() if first[id(parameter)] == key}


def not_the_bases(model: nn.Module, entry: Attached) -> tuple[str, ...]:
    """Return what the base's identity leaves out: new modules, those trained in full, and rows trained whole.

    An adapter that trains every module belongs to all of the base as it was: then nothing is left out.
    """
    exclude = tuple(sorted({*entry.full_modules, *entry.new_modules, *entry.rows}))
    return exclude if any(not is_below(path, exclude) for path, _ in walk_parameters(model)) else ()


def freeze_base(model: nn.Module) -> dict[str, bool]:
    """Stop the base's parameters from requiring gradients; return their flags as they were."""
    flags = {}
    for name, parameter in walk_parameters(model, remove_duplicate=False):  # tied ones under each of their names
        flags[name] = parameter.requires_grad
    for _, parameter in walk_parameters(model):
        parameter.requires_grad_(False)
    return flags
