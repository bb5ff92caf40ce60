"""From a model's name to its config: is it a folder or on the hub, is it whole, and what kind is it?

Everything a user can get wrong about a model's name is found here, before a weight is read, and without
running code of the model's repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.bases.header import read_header
from lorakit.bases.quiet import quiet_transformers
from lorakit.errors import ModelError, bullet_list, did_you_mean, first_line, quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["encoder", "decoder", "encoder-decoder"]

_JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def local_folder(name: str) -> Path | None:
    """Return the folder that ``name`` means; None where it can only be a hub name.

    Raises:
        ModelError: the name is a path to nothing, or to a file.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"'{name}' is a file, not a model folder. Give the folder that it is in: '{path.parent}'.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        raise ModelError(f"there is no model folder '{name}'.{_siblings(path)}")
    return None


def check_folder(folder: Path) -> None:
    """Refuse a local folder that is not a whole model, naming every file that is at fault.

    Raises:
        ModelError: no config, an adapter instead of a model, or broken JSON.
        FormatError: no safetensors file, or a broken one.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if "adapter_config.json" in names:
        raise ModelError(f"'{folder}' holds an adapter, not a base model. Give the model that it belongs to.")
    if "config.json" not in names:
        found = f"it has {quoted(names, 6)}" if names else "it is empty"
        raise ModelError(f"'{folder}' is not a model folder: it has no config.json ({found}).")
    problems = []
    for file in (folder / name for name in _JSON_FILES if name in names):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"'{file}' is not valid JSON: {error}. Copy the file again from its source.")
    if problems:
        raise ModelError(bullet_list(problems))
    read_header(folder)


def config_values(name: str, revision: str | None) -> dict[str, Any]:
    """Read a model's raw ``config.json``, from a folder, the cache or the hub, without running any code.

    Raises:
        ModelError: a hub model that is unknown, closed or out of reach.
    """
    from transformers import PretrainedConfig

    try:
        with quiet_transformers():
            values, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(_hub_failure(name, revision, error)) from error
    if not values:
        raise ModelError(f"'{name}' has an empty config.json; it does not say what model it is.")
    return dict(values)


def hub_commit(name: str, revision: str | None) -> str | None:
    """Return the commit that a hub model's cached config belongs to; None if it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def load_config(
    name: str, revision: str | None, trust_remote_code: bool, changes: dict[str, Any] | None = None
) -> PretrainedConfig:
    """Build the model's config, with ``changes`` to its fields.

    Raises:
        ModelError: the architecture needs code from the model's repository and that was not allowed, or
            it is unknown to the installed transformers.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = config_values(name, revision)
    model_type = str(values.get("model_type", ""))
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in values):
        raise ModelError(_unknown_type(name, model_type, "auto_map" in values))
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **(changes or {})
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(f"the config of '{name}' cannot be used: {first_line(error)}") from error
    return config


def model_kind(config: PretrainedConfig) -> Kind:
    """Tell how a model reads text: 'encoder' (BERT), 'decoder' (LLaMA) or 'encoder-decoder' (T5).

    A model that predicts masked words and is not set up as a decoder is an encoder, even where
    transformers has a decoder class for the same architecture (as it has for BERT).
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.is_encoder_decoder:
        return "encoder-decoder"
    if getattr(config, "is_decoder", False):
        return "decoder"
    kind = config.model_type
    native_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    remote = getattr(config, "auto_map", None) or {}
    return "decoder" if native_decoder or "AutoModelForCausalLM" in remote else "encoder"


def _unknown_type(name: str, model_type: str, has_code: bool) -> str:
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    if has_code:
        return (
            f"'{name}' ({model_type or 'no model_type'}) needs code from its own repository. Read that code "
            "first; to run it, say so with --trust-remote-code (in Python: trust_remote_code=True)."
        )
    if not model_type:
        return f"the config.json of '{name}' has no model_type; it does not say what model it is."
    near = did_you_mean(model_type, list(CONFIG_MAPPING.keys()))
    return f"'{name}' is of type '{model_type}', which transformers {version} does not know.{near}"


def _hub_failure(name: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    wanted = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    start = f"model {wanted} is neither a folder here nor could it be had from the Hugging Face hub: "
    cause = error.__cause__
    near = _siblings(Path(name))
    if isinstance(cause, errors.GatedRepoError):
        return f"{start}access must be granted. Accept its terms on the hub, then log in with `hf auth login`."
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{start}it has no such revision."
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{start}there is no such model, or it is private (then log in with `hf auth login`).{near}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{start}HF_HUB_OFFLINE is set and it is not in the cache '{constants.HF_HUB_CACHE}'. "
            f"Unset HF_HUB_OFFLINE to download it, or give a local folder.{near}"
        )
    if isinstance(cause, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            f"{start}the hub cannot be reached and it is not in the cache '{constants.HF_HUB_CACHE}'. "
            f"Check the network, or give a local folder.{near}"
        )
    return f"{start}{first_line(error)}{near}"


def _siblings(path: Path) -> str:
    """Name the folders beside a missing one that look like it."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    if not parent.is_dir():
        return ""
    folders = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = did_you_mean(path.name, folders)
    return f" In '{parent}':{near}" if near else ""
