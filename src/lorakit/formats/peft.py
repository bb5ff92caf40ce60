"""PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

The format that the ecosystem reads. What PEFT has no word for (the exact method, the base's identity)
stands in the metadata of the safetensors file, which PEFT leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.identity import Identity
from lorakit.errors import FormatError, InputError, quoted
from lorakit.formats.format import Files, Format
from lorakit.formats.peft_config import (
    OWN_TYPE,
    config_text,
    edited_fields,
    names_in,
    parse_config,
    read_method,
    read_targets,
    to_lora,
    write_config,
)
from lorakit.formats.peft_keys import Sorted, base_key, holds_base, raise_problems, sort_keys
from lorakit.formats.peft_notes import Notes
from lorakit.formats.peft_rows import FIELD, read_rows, write_rows
from lorakit.formats.peft_sites import ReadSites, read_sites, taken, write_sites
from lorakit.formats.peft_vera import is_vera, read_vera, vera_method, write_vera
from lorakit.formats.tensors import TensorFile, read_tensors
from lorakit.methods import Method, find_method
from lorakit.methods.lora import LoRA
from lorakit.methods.patterns import at_sites
from lorakit.methods.vera import VeRA
from lorakit.version import __version__

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_LOG = logging.getLogger("lorakit")


@dataclass(frozen=True)
class PeftFormat(Format):
    """PEFT's folder format.

    Attributes:
        task_type: PEFT's word for the task ('SEQ_CLS', 'CAUSAL_LM', ...), written into the config.
        revision: the base's pinned revision, written into the config.
    """

    name: ClassVar[str] = "peft"

    task_type: str | None = None
    revision: str | None = None

    def recognises(self, folder: Path) -> bool:
        """Tell whether a folder holds any of PEFT's files."""
        return any((folder / name).exists() for name in (CONFIG, TENSORS, PICKLE))

    def read(self, folder: Path, device: str | torch.device | None = None) -> Files:
        """Read config and tensors, see :class:`Format`."""
        if not (folder / CONFIG).is_file():
            raise FormatError(
                f"'{folder}' has no {CONFIG}: rank and alpha stand only there. Copy it beside the tensors."
            )
        if (folder / TENSORS).is_file():
            try:
                text = (folder / CONFIG).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"'{folder / CONFIG}' is not UTF-8 text.") from error
            return {CONFIG: text, TENSORS: read_tensors(folder / TENSORS, device)}
        if (folder / PICKLE).is_file():
            raise FormatError(
                f"'{folder}' has its tensors as {PICKLE} only. That is a pickle: loading one can run code, so it "
                "is never opened here. If you trust it, convert it once, in Python: "
                "import torch, safetensors.torch as s; "
                f's.save_file(torch.load("{PICKLE}", weights_only=True), "{TENSORS}", {{"format": "pt"}})'
            )
        raise FormatError(f"'{folder}' has no {TENSORS}.")

    def encode(self, state: AdapterState) -> dict[str, str | TensorFile]:
        """Return config and tensors, see :class:`Format`."""
        method: LoRA | VeRA = state.method if isinstance(state.method, VeRA) else to_lora(state.method)
        written, tensors, notes = write_vera(state, method) if isinstance(method, VeRA) else write_sites(state, method)
        rows = write_rows(state)
        written.refused |= rows.refused or (isinstance(method, VeRA) and bool(rows.indices))  # a field of LoRA's alone
        config = write_config(state, method, written, self.task_type, self.revision)
        if rows.indices:
            config[FIELD] = rows.indices
        tensors.update(rows.tensors)
        for path, module in state.modules.items():
            tensors.update({base_key(f"{path}.{name}", written.wraps): tensor for name, tensor in module.items()})
        if not tensors:
            raise FormatError("the adapter has no tensors to save.")
        own = [path for path, note in notes.layers.items() if note.own]
        if own:
            _LOG.info("PEFT refuses this adapter: it cannot compute such an update of %s.", quoted(own))
        targets = tuple(sorted(set(state.targets)))
        notes = dataclasses.replace(
            notes,
            transposed=None if config["fan_in_fan_out"] else frozenset(written.transposed),
            targets=() if read_targets(config, state.sites) == targets else targets,
            rows=rows.notes,
        )
        metadata = {
            "format": "pt",
            "lorakit.method": json.dumps(state.method.summary()),
            "lorakit.version": __version__,
        }
        metadata |= notes.to_metadata()
        if state.identity is not None:
            metadata |= state.identity.to_metadata()
        return {CONFIG: config_text(config), TENSORS: TensorFile(tensors, metadata)}

    def decode(self, files: Files) -> AdapterState:
        """Return what config and tensors say, see :class:`Format`."""
        content = _read(files)
        config, found, read, notes = content.config, content.found, content.sites, content.notes
        rows, unfit = read_rows(found, config, notes.rows)
        biases, modules, problems = _plain(content)
        raise_problems(TENSORS, [*read.problems, *found.problems, *unfit, *problems], _advice(found))
        if not (read.sites or biases or modules or rows):
            raise FormatError(f"{TENSORS}: no tensor of an adapter is in it.")
        raise_problems(TENSORS, _wrong_ranks(content), " Config and tensors belong to different adapters.")
        base_name = config.get("base_model_name_or_path")
        return AdapterState(
            method=_exact_method(content),
            sites=read.sites,
            biases=biases,
            modules=modules,
            rows=rows,
            shared=content.shared,
            targets=notes.targets or read_targets(config, read.sites),
            full_modules=_full_modules(modules, names_in(config, "modules_to_save") or []),
            identity=Identity.from_metadata(content.metadata),
            base_name=base_name if isinstance(base_name, str) and base_name else None,
        )

    def base_weights(self, files: Files) -> Mapping[str, Tensor]:
        """Return what PEFT stores of a target beside the update: the base layer's own weight."""
        config, notes, tensors = _parts(files)
        if not holds_base(tensors.tensors):
            return {}
        found = sort_keys(tensors.tensors)
        return {name: t for name, t in found.base.items() if not _is_trained_bias(name, found, config, notes)}


@dataclass(frozen=True)
class _Content:
    """A folder's content: ``found`` is what is left of the tensors beside the updates, which are ``sites``."""

    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    notes: Notes
    method: LoRA | VeRA
    found: Sorted
    sites: ReadSites
    biases: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = field(default_factory=dict)


def _parts(files: Files) -> tuple[dict[str, Any], Notes, TensorFile]:
    config, tensors = files.get(CONFIG), files.get(TENSORS)
    if not isinstance(config, str) or not isinstance(tensors, TensorFile):
        raise FormatError(f"PEFT's format needs both {CONFIG} and {TENSORS}.")
    return parse_config(config), Notes.from_metadata(tensors.metadata), tensors


def _read(files: Files) -> _Content:
    config, notes, tensors = _parts(files)
    if config["peft_type"] == OWN_TYPE and "lorakit.method" not in tensors.metadata:
        raise FormatError(
            f"{TENSORS} has lost its metadata, without which the tensors of an adapter of type {OWN_TYPE} cannot be "
            "told: take the file as it was saved."
        )
    found = sort_keys(tensors.tensors)
    if is_vera(config):
        own, shared = read_vera(found, config, notes)
        stated = vera_method(config, tensors.metadata)
        return _Content(config, tensors.metadata, notes, stated, found, ReadSites([], own), {}, shared)
    method = read_method(config)
    trained = {name for name in found.base if _is_trained_bias(name, found, config, notes)}
    sites = read_sites(found, config, method, notes)
    biases = {p: bias for name, p in notes.biases.items() if (bias := taken(found, name)) is not None}
    found.problems += [f"'{name}' is not understood" for name in sorted(trained & found.base.keys())]
    return _Content(config, tensors.metadata, notes, method, found, sites, biases)


def _is_trained_bias(name: str, found: Sorted, config: Mapping[str, Any], notes: Notes) -> bool:
    """Tell whether what stands beside an update is the adapter's bias, not a copy of the base's weight."""
    if (config.get("bias") or "none") == "none" or not name.endswith("bias"):
        return False
    return name in notes.biases or any(module == name.rpartition(".")[0] for module, _ in found.updates)


def _plain(content: _Content) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[str]]:
    """Tell the biases from the modules trained in full, and name what is neither."""
    found, config = content.found, content.config
    biases: dict[str, Tensor] = {**content.sites.biases, **content.biases}
    modules: dict[str, dict[str, Tensor]] = {}
    problems = [f"the trained bias of '{p}' is missing" for p in content.notes.biases.values() if p not in biases]
    problems += [
        f"'{p}' has both an update and a weight of its own" for p in content.sites.sites if f"{p}.weight" in found.plain
    ]
    chosen = names_in(config, "modules_to_save") or []
    bias_trained = (config.get("bias") or "none") != "none"
    holders = {key.rpartition(".")[0] for key in found.plain if key.endswith(".weight")}
    for key, tensor in found.plain.items():
        path, _, name = key.rpartition(".")
        stray_module = path in holders and name in ("weight", "bias")
        if path and (_root(path, chosen) is not None or stray_module):
            modules.setdefault(path, {})[name] = tensor
        elif path and name == "bias" and bias_trained:
            biases[path] = tensor
        else:
            problems.append(f"'{key}' is not understood")
    return biases, _grouped(modules), problems


def _grouped(modules: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Put a module's tensors under the outermost module that has parameters of its own."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for path in sorted(modules, key=len):
        outer = next((other for other in grouped if path.startswith(f"{other}.")), path)
        inner = path.removeprefix(outer).removeprefix(".")
        names = {f"{inner}.{name}" if inner else name: tensor for name, tensor in modules[path].items()}
        grouped.setdefault(outer, {}).update(names)
    return grouped


def _root(path: str, names: list[str]) -> str | None:
    """Return the module at or above ``path`` that one of PEFT's names means, or None."""
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((p for p in above if any(p == name or p.endswith(f".{name}") for name in names)), None)


def _full_modules(modules: Mapping[str, Any], names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({_root(path, names) or path for path in modules}))


def _wrong_ranks(content: _Content) -> list[str]:
    if isinstance(content.method, VeRA):
        return []
    wanted = {path: content.method.rank_at(path) for path in content.sites.keys}
    return [
        f"'{path}' has rank {key.rank}, the config says {wanted[path]}"
        for path, key in content.sites.keys.items()
        if key.rank != wanted[path]
    ]


def _exact_method(content: _Content) -> Method:
    """Return the method as it was saved, where the file says so and the config still agrees with it."""
    if isinstance(content.method, VeRA):
        return content.method
    read, saved = content.sites, content.metadata.get("lorakit.method")
    ranks = {path: int(site.tensors["A"].shape[-2]) for path, site in read.sites.items()}
    keys = {path: read.keys[read.places[path]] for path in ranks}
    scales = {p: content.method.scale_at(read.places[p], key.rank) for p, key in keys.items()}
    stated = at_sites(content.method, {path: (ranks[path], scales[path]) for path in ranks})
    if saved is None:
        return stated
    try:
        exact = find_method(json.loads(saved))
        edited = edited_fields(content.config, exact, read.keys) if isinstance(exact, LoRA) else []
    except (InputError, ValueError) as error:
        _LOG.warning("the method that the file was saved with is not known here (%s); %s is used.", error, CONFIG)
        return stated
    if edited:
        _LOG.warning("%s was changed after saving (%s); what it says now is used.", CONFIG, quoted(edited))
        return stated
    if not isinstance(exact, LoRA):
        return stated if exact.needs_sites() or ranks else exact
    return at_sites(exact, {path: (rank, exact.scale_at(path, rank)) for path, rank in ranks.items()})


def _advice(found: Sorted) -> str:
    if any("empty" in problem for problem in found.problems):
        return " Gather the parameters before saving and save the adapter again."
    return ""
