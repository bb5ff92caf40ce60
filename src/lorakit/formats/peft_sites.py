"""All updates and trained biases of an adapter in PEFT's spellings, and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.errors import FormatError
from lorakit.formats.peft_keys import PREFIX, Sorted, base_key, natural, update_key
from lorakit.formats.peft_layers import OwnForm, PlainSpelling, Reading, Spelling, Written
from lorakit.formats.peft_nested import AttentionSpelling, ParameterSpelling
from lorakit.formats.peft_notes import Notes, weight_path
from lorakit.formats.peft_parts import Key, Share, Weight, join, split
from lorakit.methods.lora import LoRA

# In this order they take what is theirs out of a file: what looks least like a plain layer first.
_SPELLINGS: tuple[Spelling, ...] = (AttentionSpelling(), ParameterSpelling(), PlainSpelling())
_OWN = OwnForm()

# Kinds of which a module has several weights, and what their biases are called.
_SEVERAL = frozenset({"attention", "experts", "parameter", "recurrent", "recurrent_cell"})
_GATES = re.compile(r"weight_(?P<rest>(ih|hh)(_l\d+)?(_reverse)?)")


@dataclass(frozen=True)
class ReadSites:
    """What a file says of its updates.

    Attributes:
        problems: what speaks against the file.
        sites, biases: as in ``AdapterState``; the biases are those of sites.
        keys: by the path at which PEFT's patterns say rank and alpha.
        places: that path, by site.
    """

    problems: list[str]
    sites: dict[str, SiteState] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, weight: Weight) -> None:
        """Note by which path PEFT finds a weight's rank and alpha."""
        self.keys[key] = weight.key()
        self.places.update({share.site: key for share in weight.shares})


def write_sites(state: AdapterState, method: LoRA) -> tuple[Written, dict[str, Tensor], Notes]:
    """Return what is written of a state's updates, the tensors of updates and biases by key, and notes.

    Raises:
        FormatError: PEFT has no name for a tensor of the method.
    """
    unnamed = [(path, n) for path, site in state.sites.items() for n in site.tensors if n not in method.peft_tensors]
    if unnamed:
        path, name = unnamed[0]
        raise FormatError(f"PEFT's format has no name for the tensor '{name}' of layer '{path}'.")
    written = Written()
    biases: dict[str, Tensor] = {}  # by the base's name of the parameter, or by a name of our own
    for module, sites in _modules(state.sites).items():
        here, own = _spelled(module, sites, state.biases, method)
        written.add(here)
        biases.update(own)
    others: dict[str, str] = {}
    for path in [path for path in state.biases if path not in state.sites]:
        known = bias_name(path, None, state.biases[path].dim() == 2)
        written.refused |= known is None
        others[known or f"{path}.bias"] = path
    biases.update({name: state.biases[path] for name, path in others.items()})
    tensors = {update_key(address, written.wraps): tensor for address, tensor in written.updates.items()}
    tensors.update({base_key(name, written.wraps): tensor for name, tensor in biases.items()})
    renamed = {n: path for n, path in others.items() if base_key(n, written.wraps) != f"{PREFIX}{path}.bias"}
    return written, tensors, Notes(layers=written.notes, biases=renamed)


def _modules(sites: Mapping[str, SiteState]) -> dict[str, dict[str, SiteState]]:
    """Return the sites by the module that PEFT has a place for."""
    found: dict[str, dict[str, SiteState]] = {}
    for path, site in sites.items():
        weight = weight_path(path, site.runs)
        module = weight.rpartition(".")[0] if site.kind in _SEVERAL else weight
        found.setdefault(module, {})[path] = site
    return found


def _spelled(
    module: str, sites: Mapping[str, SiteState], biases: Mapping[str, Tensor], method: LoRA
) -> tuple[Written, dict[str, Tensor]]:
    """Return one module's updates as PEFT has them, else in our own form, and their biases by name."""
    groups: dict[str, dict[str, SiteState]] = {}
    for path, site in sites.items():
        groups.setdefault(weight_path(path, site.runs), {})[path] = site
    kinds = {site.kind for site in sites.values()}
    spelling = next((spelling for spelling in _SPELLINGS if kinds <= spelling.kinds), None)
    joined = [join(path, group, biases, method) for path, group in groups.items()]
    weights = [weight for weight in joined if weight is not None]
    written = None
    if spelling is not None and len(weights) == len(joined):
        written = spelling.write(module, weights, method)
    if written is None:
        return _OWN.write(module, sites, method), {f"{p}.bias": biases[p] for p in sites if p in biases}
    named = {bias_name(w.path, w.kind, False): w.tensors["bias"] for w in weights if "bias" in w.tensors}
    return written, {name: bias for name, bias in named.items() if name is not None}


def bias_name(path: str, kind: str | None, stacked: bool) -> str | None:
    """Return the base's name of the bias that belongs to a weight, or None where it is only rows of one.

    Args:
        path: the weight's path.
        kind: the layer's kind; None where only the path says it, by names that torch and transformers gave.
        stacked: whether it is the bias of a stack of matrices.
    """
    parent, _, last = path.rpartition(".")
    gates = _GATES.fullmatch(last)
    if kind in (None, "attention") and last == "in_proj_weight":
        return f"{parent}.in_proj_bias"
    if kind in (None, "attention") and last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return None
    if kind in (None, "recurrent", "recurrent_cell") and gates is not None:
        return f"{parent}.bias_{gates['rest']}"
    return f"{path}_bias" if stacked or kind in ParameterSpelling.kinds else f"{path}.bias"


def read_sites(found: Sorted, config: Mapping[str, Any], method: LoRA, notes: Notes) -> ReadSites:
    """Take all updates out of a file, and the biases of their layers where the config says that they are trained."""
    reading = Reading(found, config, method, notes)
    _OWN.read(reading)
    for spelling in _SPELLINGS:
        spelling.read(reading)
    trained = (config.get("bias") or "none") != "none"
    read = ReadSites(reading.problems)
    for path, site in reading.sites.items():
        read.put(
            path, Weight(path, site.kind, site.weight_shape, site.tensors, (Share(path, notes.layers[path].rank),))
        )
        read.sites[path] = site
        if trained and f"{path}.bias" in found.plain:
            read.biases[path] = found.plain.pop(f"{path}.bias")
    for key, weight in reading.weights:
        name = bias_name(weight.path, weight.kind, False)
        bias = taken(found, name) if trained and name is not None else None
        whole = weight if bias is None else dataclasses.replace(weight, tensors={**weight.tensors, "bias": bias})
        sites, biases, problems = split(whole)
        read.put(key, weight)
        read.sites.update(sites)
        read.biases.update(biases)
        read.problems.extend(problems)
    ordered = sorted(_modules(read.sites).items(), key=lambda item: natural(item[0]))
    return dataclasses.replace(read, sites={path: site for _, sites in ordered for path, site in sites.items()})


def taken(found: Sorted, name: str) -> Tensor | None:
    """Take one of the base's parameters out of a file, None where it is not there."""
    return found.base.pop(name, None) if name in found.base else found.plain.pop(name, None)
