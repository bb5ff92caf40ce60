"""PEFT's ``adapter_config.json``: written so that every version reads it, read strictly.

Older PEFT versions fail on a field that they do not know, so only the oldest fields are always
written; ``use_rslora``, ``use_dora`` and the patterns only where they say something.

PEFT finds a layer's rank and alpha by patterns, ours are the tensors' own and the method's. Both must
agree at every layer, so what is written is checked by PEFT's rule and spelled out where it differs.

Where an adapter has an update that PEFT knows the layer for, but cannot compute, ``peft_type`` is a type
that PEFT does not have: every version of it refuses the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.adapters import AdapterState
from lorakit.errors import FormatError, InputError, bullet_list
from lorakit.formats.peft_layers import Written
from lorakit.formats.peft_parts import Key
from lorakit.layers.site import PART
from lorakit.methods import Method
from lorakit.methods.lora import LoRA
from lorakit.methods.method import method_types
from lorakit.methods.patterns import ranks_and_alphas, whole
from lorakit.methods.vera import VeRA

OWN_TYPE = "LORAKIT"
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# PEFT's model for these tasks adds the head to modules_to_save by itself and then needs its tensors.
_TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

# What decides the numbers that PEFT computes with.
_COMPUTING: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}

# Read here, or without a part in what a finished adapter computes.
_HARMLESS = frozenset(
    {
        *_COMPUTING,
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
        *(
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "modules_to_save",
            "trainable_token_indices",
        ),
        *("fan_in_fan_out", "inference_mode", "init_lora_weights", "merge_weights", "enable_lora"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    }
)

# VeRA's own, read by it alone.
_VERA = frozenset({"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"})

_ACTIVE = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes each token among several adapters",
    "ensure_weight_tying": "tied copies of a module are stored once",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "the base's layers are repeated before the adapter is put on",
    "lora_bias": "the update has a bias of its own",
    "megatron_config": "the layers are Megatron's",
    "monteclora_config": "MonteCLoRA has tensors of its own",
    "use_bdlora": "the factors are block-diagonal",
    "use_qalora": "the input is pooled by groups of channels",
    "velora_config": "VeLoRA has tensors of its own",
}

_SHIFTED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def write_config(
    state: AdapterState,
    method: LoRA | VeRA,
    written: Written,
    task_type: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json``.

    Raises:
        FormatError: PEFT has no way to say it; every reason is named.
    """
    fields = method.to_peft() if isinstance(method, VeRA) else lora_config(method, written.keys)
    problems = _unspeakable(state, fields["bias"], task_type)
    if problems:
        raise FormatError(f"PEFT's format cannot hold this adapter: {bullet_list(problems)}")
    config = {
        **fields,
        "task_type": task_type,
        "base_model_name_or_path": state.base_name,
        "revision": revision,
        "target_modules": _targets(_names_of(state.targets, written.modules), written.modules),
        "modules_to_save": _modules_to_save(state) or None,
        "fan_in_fan_out": bool(written.transposed) and not written.linear and not written.parameters,
        "inference_mode": True,
    }
    if written.parameters:
        config["target_parameters"] = _targets(_names_of(state.targets, written.parameters), written.parameters)
    if written.refused:
        config["peft_type"] = OWN_TYPE
    return config


def config_text(config: Mapping[str, Any]) -> str:
    """Return the text of ``adapter_config.json``: the same for the same fields, with a final newline."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _unspeakable(state: AdapterState, bias: str, task_type: str | None) -> list[str]:
    problems = []
    if state.parts:
        problems.append(f"it has parts that belong to no layer ({', '.join(sorted(state.parts))})")
    others = sorted(set(state.biases) - set(state.sites))
    if state.biases and bias == "none":
        problems.append("it has trained biases, but its method says bias='none'")
    elif others and bias == "lora_only":
        problems.append(f"it has a trained bias that is no target's ('{others[0]}'), but bias='lora_only'")
    if task_type is not None and task_type not in TASK_TYPES:
        problems.append(f"no task type '{task_type}'; PEFT knows {', '.join(TASK_TYPES)}")
    elif task_type in _TASKS_WITH_HEAD and not state.modules:
        problems.append(f"task type {task_type} means a trained head in PEFT, and it has none; leave the task type out")
    return problems


def to_lora(method: Method) -> LoRA:
    """Return the method as one that PEFT has a spelling for.

    Raises:
        FormatError: it has none.
    """
    if isinstance(method, LoRA) and method.to_peft() is not None:
        return method
    if not method.needs_sites():  # modules trained in full alone: to PEFT a LoRA without targets
        return LoRA()
    raise FormatError(f"PEFT's format has no spelling here for the method '{method.name}'.")


def lora_config(method: LoRA, keys: Mapping[str, Key]) -> dict[str, Any]:
    """Return the method's fields, with patterns by which PEFT finds every rank and scale."""
    wanted = {path: (key.rank, key.scale(method)) for path, key in keys.items()}
    fields = {**method.to_peft(), "rank_pattern": method.rank_pattern, "alpha_pattern": method.alpha_pattern}
    fields.update(ranks_and_alphas(method, wanted))
    fields["lora_alpha"] = whole(fields["lora_alpha"])
    return {name: value for name, value in fields.items() if value or not name.endswith("_pattern")}


def matches(name: str, path: str) -> bool:
    """Tell whether a name in a list of PEFT's means this path: all of it, or its end after a dot."""
    return path == name or path.endswith(f".{name}")


def _targets(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return ``names`` if they cover exactly ``paths``, as far as that can be told, else the paths."""
    names, paths = sorted(set(names)), sorted(set(paths))
    covered = all(any(matches(name, path) for name in names) for path in paths)
    return names if covered and all(any(matches(n, p) for p in paths) for n in names) else paths


def _names_of(targets: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the targets that mean any of ``paths``, without the parts that they name: PEFT's target is the whole."""
    wholes = [part["path"] if (part := PART.fullmatch(name)) else name for name in targets]
    return [name for name in wholes if any(matches(name, path) for path in paths)]


def _modules_to_save(state: AdapterState) -> list[str]:
    """Return the chosen modules that have tensors, and the paths of all tensors that none of them covers."""
    chosen = [n for n in state.full_modules if any(f"{p}.".startswith(f"{n}.") for p in state.modules)]
    rest = [p for p in state.modules if not any(f"{p}.".startswith(f"{n}.") for n in chosen)]
    return sorted({*chosen, *rest})


def parse_config(text: str) -> dict[str, Any]:
    """Read the text of ``adapter_config.json`` and refuse what is active in it and not supported here.

    Raises:
        FormatError: it is not JSON, of another type than LORA, or uses features that are not supported.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise FormatError(f"adapter_config.json is not JSON ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError("adapter_config.json has no 'peft_type': it is not a config of PEFT's.")
    kind = config["peft_type"].upper()
    unknown = "a field that is not known here and may change what the adapter computes"
    problems = [
        f"'{key}' is {json.dumps(value)[:60]}: {_ACTIVE.get(key, unknown)}"
        for key, value in sorted(config.items())
        if key not in (_HARMLESS if kind == "LORA" else _HARMLESS | _VERA) and value not in (None, False, "", [], {})
    ]
    if kind not in ("LORA", "VERA", OWN_TYPE):
        problems = [f"'peft_type' is '{config['peft_type']}'; LORA (with DoRA and rsLoRA) and VERA are supported"]
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_SHIFTED_BASE):
        problems.append(
            f"'init_lora_weights' is '{init}': its training started from a changed base, which the file does not hold. "
            "Let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if problems:
        raise FormatError(f"adapter_config.json cannot be read as it is: {bullet_list(problems)}")
    return config


def read_method(config: Mapping[str, Any]) -> LoRA:
    """Return the method that a config describes.

    Raises:
        FormatError: a field has a value that is not allowed.
    """
    try:
        for kind in method_types():
            method = kind.from_peft({**config, "peft_type": "LORA"})
            if isinstance(method, LoRA):
                return method
    except (InputError, TypeError, ValueError) as error:
        raise FormatError(f"adapter_config.json: {error}") from error
    raise FormatError(f"adapter_config.json: no method here reads peft_type '{config.get('peft_type')}'.")


def edited_fields(config: Mapping[str, Any], method: LoRA, keys: Mapping[str, Key]) -> list[str]:
    """Return the config's fields that say something else than ``method``, which was saved with it."""
    written = lora_config(method, keys)
    return [key for key, default in _COMPUTING.items() if (config.get(key) or default) != (written.get(key) or default)]


def names_in(config: Mapping[str, Any], key: str) -> list[str] | None:
    """Return a field that is a list of names; None where it is a regular expression, a word or absent.

    Raises:
        FormatError: it is something else.
    """
    value = config.get(key)
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise FormatError(f"adapter_config.json: '{key}' must be a list of names, found {json.dumps(value)[:60]}.")


def read_targets(config: Mapping[str, Any], sites: Iterable[str]) -> tuple[str, ...]:
    """Return names that mean exactly ``sites``: the config's where they do, else the full paths."""
    paths = sorted(sites)
    narrowed = any(config.get(key) not in (None, [], "") for key in ("layers_to_transform", "exclude_modules"))
    names = names_in(config, "target_modules")
    named = None if names is None else [*names, *(names_in(config, "target_parameters") or [])]
    return tuple(paths if named is None or narrowed else _targets(named, paths))
