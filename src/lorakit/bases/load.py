"""Loading a base: from a name and a task to a frozen model, its tokenizer and its new modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapters.identity import non_finite
from lorakit.bases.header import HOW_TO_CONVERT
from lorakit.bases.quiet import quiet_transformers
from lorakit.bases.source import check_folder, hub_commit, load_config, local_folder, model_kind
from lorakit.bases.tokenizer import ensure_padding, load_tokenizer
from lorakit.errors import ConfigError, ModelError, did_you_mean, quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("classification", "generation", "language-modeling", "features")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype words; 'auto' is the one the checkpoint was saved in."""

_WRITES_TEXT = ("generation", "language-modeling")


@dataclass
class Base:
    """A base model as it was loaded: frozen and in eval mode.

    Attributes:
        model: a transformers model on its device; no parameter requires a gradient.
        tokenizer: its tokenizer, with a padding token.
        name: the folder or hub name it was asked for by.
        revision: the hub commit it came from; None for a folder.
        new_modules: paths of the modules that the checkpoint lacks and the seed filled, e.g.
            ``("classifier",)``. They do not belong to the base's identity and are trained in full.
        in_full: what of embedding and head a run trains beside its adapter, as ``train_modules`` names it.
        extended: the tokenizer has tokens that the base was not trained with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    new_modules: tuple[str, ...]
    in_full: tuple[str, ...] = ()
    extended: bool = False


def load_base(
    name: str | os.PathLike[str],
    task: str,
    *,
    labels: Sequence[str] = (),
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Base:
    """Load the model ``name`` with the head that ``task`` needs.

    Args:
        name: a folder, or a name on the Hugging Face hub (``HF_HUB_OFFLINE=1`` uses its cache alone).
        task: one of ``TASKS``; 'features' is the model without a head.
        labels: class names in logit order; without them a classifier keeps the checkpoint's own.
        dtype: 'auto' (the checkpoint's), 'fp32', 'bf16' or 'fp16'.
        device: where the model goes once it is loaded.
        revision: commit, tag or branch on the hub.
        trust_remote_code: allow code of the model's repository to run.
        seed: of a new head's values; the caller's random state is left alone.

    Raises:
        ConfigError: an unknown task or dtype, or a device that is not here.
        ModelError: the model is missing, broken, unfit for the task or has NaN in its weights.
        FormatError: a weight file is missing, a pickle, or broken.
    """
    name = os.fspath(name)
    target_device = _checked(task, dtype, device)
    folder = local_folder(name)
    if folder is not None:
        if revision is not None:
            raise ModelError(f"'{name}' is a folder and has no revisions; leave out revision '{revision}'.")
        check_folder(folder)
    source = str(folder) if folder is not None else name
    config = load_config(source, revision, trust_remote_code, _label_fields(task, labels))
    if folder is None:
        # Weights and tokenizer come from the commit of the config, even if the branch moves meanwhile.
        revision = hub_commit(name, revision) or revision
    model, new_modules = _load_model(source, task, config, dtype, revision, trust_remote_code, seed)
    tokenizer = load_tokenizer(source, revision, trust_remote_code)
    ensure_padding(model, tokenizer, required=task == "classification" and model_kind(config) == "decoder")
    broken = non_finite(model)
    if broken:
        raise ModelError(
            f"{len(broken)} weights of '{name}' contain NaN or infinity: {quoted(broken)}. The checkpoint "
            "is damaged, or its values do not fit the dtype asked for; load it as fp32 or take another copy."
        )
    _freeze(model, target_device)
    return Base(model, tokenizer, name, revision, new_modules)


def _freeze(model: nn.Module, device: torch.device) -> None:
    model.requires_grad_(False)
    model.train(False)
    model.to(device)


def _checked(task: str, dtype: str, device: str | torch.device) -> torch.device:
    if task not in TASKS:
        raise ConfigError(f"unknown task '{task}'.{did_you_mean(task, TASKS)} Known: {quoted(TASKS)}.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'. Known: {quoted(('auto', *DTYPES))}.")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{device}'. Use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{device}' was asked for; torch {torch.__version__} finds no CUDA device here.")
    return found


def _label_fields(task: str, labels: Sequence[str]) -> dict[str, Any]:
    if task != "classification" or not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _load_model(
    source: str,
    task: str,
    config: PretrainedConfig,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    seed: int,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    from safetensors import SafetensorError

    model_class = _class_for(source, task, config, trust_remote_code)
    try:
        # Loading draws nothing else from the CPU's generator, so the seed alone decides the new head.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, info = model_class.from_pretrained(
                source,
                config=config,
                dtype=DTYPES.get(dtype, "auto"),
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        pickled = "does not appear to have a file named model.safetensors" in str(error)
        reason = f"it has no safetensors file. {HOW_TO_CONVERT}" if pickled else str(error)
        raise ModelError(f"the weights of '{source}' cannot be loaded: {reason}") from error
    if model._hf_peft_config_loaded:
        raise ModelError(f"'{source}' holds an adapter, not a base model. Give the model that it belongs to.")
    return model, _new_modules(source, task, model, info)


def _class_for(source: str, task: str, config: PretrainedConfig, trust_remote_code: bool) -> Any:
    """Choose the Auto class of a task, and refuse a model that has no head for it."""
    import transformers

    kind = model_kind(config)
    if task in _WRITES_TEXT and kind == "encoder":
        raise ModelError(
            f"'{source}' is an encoder-only model ({config.model_type}): it reads text but does not write "
            f"it, so it cannot do {task}. It can do: 'classification', 'features'. "
            f"For {task} take a decoder such as LLaMA or Qwen."
        )
    name = {
        "classification": "AutoModelForSequenceClassification",
        "features": "AutoModel",
    }.get(task, "AutoModelForSeq2SeqLM" if kind == "encoder-decoder" else "AutoModelForCausalLM")
    auto_class: Any = getattr(transformers, name)
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in auto_class._model_mapping and not (trust_remote_code and name in remote):
        flag = " Its repository has code for it; to run that, say --trust-remote-code." if name in remote else ""
        raise ModelError(
            f"'{source}' ({config.model_type}) has no {name} in transformers, so it cannot do {task}.{flag}"
        )
    return auto_class


def _new_modules(source: str, task: str, model: PreTrainedModel, info: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that the checkpoint did not fill; the body must be complete, a head may be new."""
    missing = set(info["missing_keys"])
    mismatched = {key: (tuple(found), tuple(needed)) for key, found, needed in info["mismatched_keys"]}
    head = _head_keys(model)
    lost = sorted(missing - head)
    if lost:
        raise ModelError(
            f"the checkpoint '{source}' lacks {len(lost)} tensors of the body of {type(model).__name__}: "
            f"{quoted(lost, 5)}. It is not complete, or of another architecture than its config.json says."
        )
    unfit = sorted(key for key in mismatched if key not in head or task != "classification")
    if unfit:
        shapes = [
            f"{key}: {list(mismatched[key][0])} in the file, {list(mismatched[key][1])} by the config" for key in unfit
        ]
        raise ModelError(f"the checkpoint '{source}' does not fit its config.json: {quoted(shapes, 5)}.")
    return _module_paths(model, missing | mismatched.keys())


def _head_keys(model: PreTrainedModel) -> set[str]:
    """Name what a checkpoint of the bare body may lack: all outside the body, poolers, the output layer."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    body: nn.Module = model.base_model
    find_output: Any = model.get_output_embeddings
    output = find_output()
    outputs = {id(tensor) for tensor in output.parameters()} if isinstance(output, nn.Module) else set()
    inside = {id(tensor) for tensor in (*body.parameters(), *body.buffers())}
    return {
        key
        for key, tensor in tensors
        if id(tensor) not in inside or id(tensor) in outputs or "pooler" in key.split(".")
    }


def _module_paths(model: nn.Module, keys: Iterable[str]) -> tuple[str, ...]:
    """Reduce parameter names to the highest modules that consist of them alone."""
    wanted = set(keys)
    paths = set()
    for key in wanted:
        path = key.rpartition(".")[0]
        parent = path.rpartition(".")[0]
        while parent and {f"{parent}.{name}" for name in model.get_submodule(parent).state_dict()} <= wanted:
            path, parent = parent, parent.rpartition(".")[0]
        paths.add(path)
    return tuple(sorted(paths))
