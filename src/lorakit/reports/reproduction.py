"""The command that trains a run again, from what its ``config.yaml`` says."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from lorakit.errors import ConfigError
from lorakit.methods import find_method
from lorakit.training.config import SHORTHANDS, RunConfig, TrainConfig

CONFIG_FILE = "config.yaml"
_NOT_AS_FLAGS = ("method", "output", "force", *SHORTHANDS)


def reproduction(settings: Mapping[str, Any] | None, run_name: str) -> tuple[str | None, str]:
    """Return the command that trains with the same settings, quoted for a shell, and a remark on it.

    Where a setting has no flag, the command names the run's own file of settings. Without a command (None) the
    remark says why.
    """
    if settings is None:
        return None, f"This run folder has no {CONFIG_FILE}, so the command is not known."
    try:
        config = RunConfig(**settings)
    except ConfigError as error:
        return None, f"{CONFIG_FILE} does not fit this version of lorakit: {error}"
    if config.model is None or config.data is None:
        return None, "The model or the rows were given as Python objects, so no command says this run."
    flags = _flags(config)
    words = ["train", config.model, config.data, *(flags or ())]
    if flags is None or config.model.startswith("-") or config.data.startswith("-"):
        words = ["train", "--config", os.path.join(run_name, CONFIG_FILE)]
    return shlex.join(["lorakit", *words]), "Trains into a new folder below runs; --output names another."


def _flags(config: RunConfig) -> list[str] | None:
    """Return the settings that differ from the defaults as flags of ``lorakit train``; None if one has no flag."""
    found = _method_flags(config)
    if found is None:
        return None
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if name in _NOT_AS_FLAGS or value == field.get_default(call_default_factory=True):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
            continue
        text = _flag_text(name, value)
        if text is None:
            return None
        found += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return found


def _method_flags(config: RunConfig) -> list[str] | None:
    """Return the method's name and shorthands as flags; None where its other fields are not the usual ones."""
    try:
        wanted = config.resolved_method().summary()
        usual = find_method(str(wanted["name"])).summary()
        changed = {name: wanted[name] for name in SHORTHANDS if wanted.get(name) != usual.get(name)}
        if "init" in changed:
            changed["init"] = changed["init"]["name"]
        if find_method({"name": wanted["name"], **changed}).summary() != wanted:
            return None
    except ConfigError:
        return None
    method = [] if wanted["name"] == TrainConfig.model_fields["method"].default else ["--method", str(wanted["name"])]
    return [*method, *(word for name, value in changed.items() for word in (f"--{name}", _word(value)))]


def _flag_text(name: str, value: Any) -> str | None:
    """Write a value as the flag reads it; None where no flag does."""
    if name == "halve_micro_at":
        return None
    if name == "columns":
        return _listed([f"{field}={column}" for field, column in value.items()])
    if name in ("train_modules", "add_tokens") and isinstance(value, list):
        return _listed(value)
    if isinstance(value, list) or name == "train_modules":
        return None
    return _number(value) if isinstance(value, float) else str(value)


def _listed(items: list[str]) -> str | None:
    """Write items parted by commas; None where they would not be read back as they are."""
    whole = items and all(item and item == item.strip() and "," not in item for item in items)
    return ",".join(items) if whole else None


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)
