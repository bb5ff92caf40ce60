"""PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

The format that the ecosystem reads. What PEFT has no word for (the exact method, the base's identity)
stands in the metadata of the safetensors file, which PEFT leaves alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.adapters.identity import Identity
from lorakit.errors import FormatError, InputError, quoted
from lorakit.formats.format import Files, Format
from lorakit.formats.peft_config import (
    edited_fields,
    names_in,
    parse_config,
    read_method,
    read_targets,
    write_config,
)
from lorakit.formats.peft_keys import PREFIX, Sorted, raise_problems, read_site, sort_keys, write_site
from lorakit.formats.tensors import TensorFile, read_tensors
from lorakit.methods import Method, find_method
from lorakit.methods.lora import LoRA
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
        config = write_config(state, self.task_type, self.revision)
        tensors: dict[str, Tensor] = {}
        for path, site in state.sites.items():
            tensors.update(write_site(path, site, state.method.peft_tensors))
        for path, bias in state.biases.items():
            tensors[f"{PREFIX}{path}.base_layer.bias" if path in state.sites else f"{PREFIX}{path}.bias"] = bias
        for path, module in state.modules.items():
            tensors.update({f"{PREFIX}{path}.{name}": tensor for name, tensor in module.items()})
        if not tensors:
            raise FormatError("the adapter has no tensors to save.")
        return {CONFIG: config, TENSORS: TensorFile(tensors, _metadata(state, json.loads(config)["fan_in_fan_out"]))}

    def decode(self, files: Files) -> AdapterState:
        """Return what config and tensors say, see :class:`Format`."""
        config, content, found = _parts(files)
        method = read_method(config)
        sites, problems = _sites(found, method, config, content.metadata)
        biases, modules, others = _plain(found, config)
        problems += found.problems + others
        raise_problems(TENSORS, problems, _advice(found))
        if not (sites or biases or modules):
            raise FormatError(f"{TENSORS}: no tensor of an adapter is in it.")
        if isinstance(method, LoRA):
            wrong = [
                f"'{path}' has rank {site.tensors['A'].shape[0]}, the config says {method.rank_at(path)}"
                for path, site in sites.items()
                if site.tensors["A"].shape[0] != method.rank_at(path)
            ]
            raise_problems(TENSORS, wrong, " Config and tensors belong to different adapters.")
        base_name = config.get("base_model_name_or_path")
        return AdapterState(
            method=_exact_method(method, config, content.metadata, sites),
            sites=sites,
            biases=biases,
            modules=modules,
            targets=read_targets(config, sites),
            full_modules=_full_modules(modules, names_in(config, "modules_to_save") or []),
            identity=Identity.from_metadata(content.metadata),
            base_name=base_name if isinstance(base_name, str) and base_name else None,
        )

    def base_weights(self, files: Files) -> Mapping[str, Tensor]:
        """Return what PEFT stores of a target beside the update: the base layer's own weight."""
        config, _, found = _parts(files)
        own_bias = (config.get("bias") or "none") != "none"
        return {n: t for n, t in found.base.items() if not (own_bias and n.endswith(".bias") and _is_site(found, n))}


def _parts(files: Files) -> tuple[dict[str, Any], TensorFile, Sorted]:
    config, content = files.get(CONFIG), files.get(TENSORS)
    if not isinstance(config, str) or not isinstance(content, TensorFile):
        raise FormatError(f"PEFT's format needs both {CONFIG} and {TENSORS}.")
    return parse_config(config), content, sort_keys(content.tensors)


def _sites(
    found: Sorted, method: Method, config: Mapping[str, Any], notes: Mapping[str, str]
) -> tuple[dict[str, SiteState], list[str]]:
    sites: dict[str, SiteState] = {}
    problems: list[str] = []
    transposed = set(json.loads(notes.get("lorakit.transposed", "[]")))
    all_transposed = bool(config.get("fan_in_fan_out")) and "lorakit.transposed" not in notes
    for path, tensors in found.updates.items():
        if f"{path}.weight" in found.plain:
            problems.append(f"'{path}' has both an update and a weight of its own")
        site, wrong = read_site(path, tensors, method.peft_tensors, all_transposed or path in transposed)
        problems += wrong
        if site is not None:
            sites[path] = site
    return sites, problems


def _plain(
    found: Sorted, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[str]]:
    """Tell the biases from the modules trained in full, and name what is neither."""
    biases: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
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
    if bias_trained:
        biases.update(
            {n.removesuffix(".bias"): t for n, t in found.base.items() if n.endswith(".bias") and _is_site(found, n)}
        )
    return biases, _grouped(modules), problems


def _is_site(found: Sorted, name: str) -> bool:
    return name.rpartition(".")[0] in found.updates


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


def _exact_method(
    method: Method, config: Mapping[str, Any], notes: Mapping[str, str], sites: Mapping[str, SiteState]
) -> Method:
    """Return the method as it was saved, where the file says so and the config still agrees with it."""
    saved = notes.get("lorakit.method")
    if saved is None:
        return method
    try:
        exact = find_method(json.loads(saved))
        edited = edited_fields(config, exact, sites)
    except (InputError, ValueError) as error:
        _LOG.warning("the method that the file was saved with is not known here (%s); %s is used.", error, CONFIG)
        return method
    if edited:
        _LOG.warning("%s was changed after saving (%s); what it says now is used.", CONFIG, quoted(edited))
        return method
    if not isinstance(exact, LoRA) or not isinstance(method, LoRA):
        return method
    if all(exact.rank_at(path) == site.tensors["A"].shape[0] for path, site in sites.items()):
        return exact
    return find_method(exact, rank_pattern=method.rank_pattern, alpha_pattern=method.alpha_pattern)


def _metadata(state: AdapterState, fan_in_fan_out: bool) -> dict[str, str]:
    """Return the strings beside the tensors: what PEFT's config has no word for."""
    notes = {"format": "pt", "lorakit.method": json.dumps(state.method.summary()), "lorakit.version": __version__}
    transposed = sorted(path for path, site in state.sites.items() if site.kind == "transposed")
    if transposed and not fan_in_fan_out:
        notes["lorakit.transposed"] = json.dumps(transposed)
    return notes if state.identity is None else {**notes, **state.identity.to_metadata()}


def _advice(found: Sorted) -> str:
    if any("empty" in problem for problem in found.problems):
        return " Gather the parameters before saving and save the adapter again."
    return ""
