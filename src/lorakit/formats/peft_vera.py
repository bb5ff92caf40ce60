"""VeRA in PEFT's files.

key                                       shape
base_model.model.M.vera_lambda_b          [d_out]      b of layer M
base_model.model.M.vera_lambda_d          [rank]       d
base_model.vera_A, base_model.vera_B      [rank, n_max], [m_max, rank]      unless save_projection is false

PEFT has VeRA for linear layers alone. Others, and parts of fused ones, stand under the site's own path, with a note
that says what they are; PEFT refuses such a folder, see :data:`lorakit.formats.peft_config.OWN_TYPE`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.errors import ConfigError, FormatError, quoted
from lorakit.formats.peft_keys import PREFIX, Sorted, natural
from lorakit.formats.peft_layers import Written
from lorakit.formats.peft_notes import Note, Notes
from lorakit.methods import find_method
from lorakit.methods.vera import VeRA

_LOG = logging.getLogger("lorakit")

_KINDS = ("linear", "transposed")
_SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
_UPDATE = re.compile(r"(?P<path>.+)\.(?P<word>vera_lambda_[bd])")
_SEED_FIELD = "projection_prng_key"


def is_vera(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is VeRA's, in PEFT's type or in our own."""
    kind = str(config["peft_type"]).upper()
    return kind == "VERA" or (kind != "LORA" and _SEED_FIELD in config)


def write_vera(state: AdapterState, method: VeRA) -> tuple[Written, dict[str, Tensor], Notes]:
    """Return what is written of a VeRA adapter's updates, their tensors by key, and notes."""
    written = Written()
    tensors: dict[str, Tensor] = {}
    notes: dict[str, Note] = {}
    for path, site in state.sites.items():
        own = site.kind not in _KINDS or site.runs is not None
        written.refused |= own
        written.modules.append(path)
        written.wraps |= {} if own else {path: 1}
        written.linear |= site.kind == "linear"
        if site.kind == "transposed":
            written.transposed.append(path)
        tensors |= {f"{PREFIX}{path}.{word}": site.tensors[name] for name, word in method.peft_tensors.items()}
        notes[path] = Note(site.kind, site.weight_shape, method.rank, site.runs, site.options, own)
    if method.save_projection:
        tensors |= {key: state.shared[name] for name, key in _SHARED.items() if name in state.shared}
    return written, tensors, Notes(layers=notes)


def read_vera(found: Sorted, config: Mapping[str, Any], notes: Notes) -> tuple[dict[str, SiteState], dict[str, Tensor]]:
    """Take a VeRA adapter's updates and its shared pair out of a file; problems go to ``found``."""
    words = {word: name for name, word in VeRA.peft_tensors.items()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(found.plain, key=natural):
        if (update := _UPDATE.fullmatch(key)) is not None:
            layers.setdefault(update["path"], {})[words[update["word"]]] = found.plain.pop(key)
    shared = {name: found.plain.pop(key) for name, key in _SHARED.items() if key in found.plain}
    if len(shared) == 1 or (config.get("save_projection", True) and not shared):
        missing = quoted([key for name, key in _SHARED.items() if name not in shared])
        found.problems.append(f"{missing} is missing, which every layer needs")
    rank = int(config.get("r", 256))
    for name, tensor in shared.items():
        if tensor.dim() != 2 or tensor.shape[0 if name == "A" else 1] != rank:
            found.problems.append(f"{_SHARED[name]} is {tuple(tensor.shape)}, the config says rank {rank}")
    sites = {}
    for path, tensors in layers.items():
        problem = _problem(tensors, rank)
        if problem is not None:
            found.problems.append(f"'{path}' {problem}")
            continue
        note = notes.layers.get(path)
        if note is None:  # PEFT's files do not say how many inputs a layer has
            kind = "transposed" if config.get("fan_in_fan_out") else "linear"
            sites[path] = SiteState(kind, (tensors["b"].shape[-1], 0), tensors)
        else:
            sites[path] = SiteState(note.kind, note.shape, tensors, note.runs, note.options)
    return sites, shared


def _problem(tensors: Mapping[str, Tensor], rank: int) -> str | None:
    """Say what is wrong with one layer's vectors."""
    for name, word in VeRA.peft_tensors.items():
        if name not in tensors:
            return f"has no {word}"
        if not tensors[name].is_floating_point() or not bool(tensors[name].isfinite().all()):
            return f"has a {word} that is not all finite numbers"
    d, b = tensors["d"], tensors["b"]
    if d.dim() not in (1, 2) or b.dim() != d.dim() or d.shape[:-1] != b.shape[:-1]:
        return f"has vectors {tuple(d.shape)} and {tuple(b.shape)} that are of no kind of layer"
    if d.shape[-1] != rank:
        return f"has rank {d.shape[-1]}, the config says {rank}"
    return None


def vera_method(config: Mapping[str, Any], metadata: Mapping[str, str]) -> VeRA:
    """Return the method as the config says it, or as it was saved where both agree.

    Raises:
        FormatError: a field has a value that is not allowed, or says something that is not supported here.
    """
    if (config.get("bias") or "none") != "none":
        raise FormatError(f"adapter_config.json: VeRA with 'bias' {json.dumps(config['bias'])} is not supported here.")
    try:
        stated = VeRA.from_peft({**config, "peft_type": "VERA"})
        saved = json.loads(metadata.get("lorakit.method", "null"))
        exact = stated if saved is None else find_method(saved)
    except (ConfigError, TypeError, ValueError) as error:
        raise FormatError(f"adapter_config.json: {error}") from error
    assert isinstance(stated, VeRA)
    if not isinstance(exact, VeRA) or exact.to_peft() != stated.to_peft():
        _LOG.warning("adapter_config.json was changed after saving; what it says now is used.")
        return stated
    return exact
