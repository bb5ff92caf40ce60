"""From a model's name and rows to everything a run needs; every check that can be made is made here."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.adapters import handle_of
from lorakit.bases import DTYPES, Base, context_length, load_base
from lorakit.bases.header import read_header
from lorakit.bases.outline import stored_dtype
from lorakit.bases.source import check_folder, config_values, local_folder
from lorakit.bases.tokenizer import ensure_padding, load_tokenizer
from lorakit.bases.vocabulary import add_tokens
from lorakit.errors import AdapterError, ConfigError, DataError, ModelError, TrainingError, quoted
from lorakit.files import existing_part
from lorakit.methods import Method
from lorakit.training import recipe as recipes
from lorakit.training.compiling import CompiledBlocks, check_compiler
from lorakit.training.config import TrainConfig
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import EncodedRow
from lorakit.training.data.layouts import Detection
from lorakit.training.data.read import read_splits, read_table, table_from_rows
from lorakit.training.data.split import split_rows
from lorakit.training.data.table import Row, Table
from lorakit.training.diagnosis import rate_far_off
from lorakit.training.fitting import fit_memory
from lorakit.training.memory import machine_bytes
from lorakit.training.observe import Observer
from lorakit.training.processes import local_device
from lorakit.training.recipe import Recipe
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks import Task, find_task
from lorakit.training.tracking import check_trackers
from lorakit.training.vocabulary import extended, trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = str | Path | Iterable[Mapping[str, Any]]
LEAST_FREE_BYTES = 64 * 2**20


@dataclass
class Prepared:
    """A run, ready to begin.

    Attributes:
        base: the frozen model and its tokenizer.
        method: what is trained.
        spec: the task.
        train, held: encoded rows to train on and to validate on.
        recipe: all settings, decided.
        notes: what the user should know of the data.
    """

    base: Base
    method: Method
    spec: TaskSpec
    train: Sequence[EncodedRow]
    held: Sequence[EncodedRow]
    recipe: Recipe
    notes: list[str]


def prepare(
    model: str | Path | nn.Module,
    rows: Rows,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    observer: Observer,
) -> Prepared:
    """Read the rows, load the model and decide every setting.

    Raises:
        InputError: whatever is wrong with the settings, the rows or the model, before any long work.
    """
    method = config.resolved_method()
    check_space(config.output)
    check_trackers(config.log_to, config.output)
    recipe = Recipe()
    observer.stage("reading the data")
    train, held, detection = read_rows(rows, config)
    recipe.say("task", detection.task, detection.reason)
    task = find_task(detection.task)
    labels = task.labels({"train": train, "validation": held}, detection)
    observer.stage("loading the model")
    labels = in_model_order(labels, model, config.revision) if labels else ()
    base = extended_base(the_base(model, tokenizer, task, labels, config, recipe), model, config, recipe)
    check_options(base.model, config)
    recipes.choose_length(config, recipe, task.usual, context_length(base.model, base.tokenizer))
    mapping = tuple(sorted((config.columns or {}).items()))
    spec = TaskSpec(detection.task, labels, recipe.max_length, separator="", layout=detection.layout, columns=mapping)
    spec = task.fitted(spec, base.model, base.tokenizer)
    observer.stage("encoding the rows")
    encoded, encoded_held = spec.encode(train, detection, base.tokenizer), spec.encode(held, detection, base.tokenizer)
    spec = spec.kind.encoded(encoded)
    counted = f"{len(encoded.rows):,} train, {len(encoded_held.rows):,} validation"
    recipe.say("rows", counted, _split_reason(config, parted=held.source == train.source))
    width = int(base.model.config.get_text_config().hidden_size)
    count = sum(parameter.numel() for parameter in base.model.parameters())
    recipes.choose_steps(config, recipe, task.usual, len(encoded.rows), width, count)
    fit_memory(config, recipe, base, spec, method, encoded.rows)
    recipes.choose_packing(config, recipe, spec.kind, base.model.config, [row.length for row in encoded.rows])
    notes = [*encoded.notes, *encoded_held.notes]
    far = rate_far_off(recipe.lr, recipe.usual_lr)
    notes += [far.text] if far is not None else []
    return Prepared(base, method, spec, encoded.rows, encoded_held.rows, recipe, notes)


def read_rows(rows: Rows, config: TrainConfig) -> tuple[Table, Table, Detection]:
    """Return training rows, validation rows, and what they are examples of.

    Raises:
        DataError: rows are wrong, or those to validate on have another layout.
    """
    tables = read_splits(rows) if isinstance(rows, (str, Path)) else {"train": table_from_rows(rows)}
    train = tables["train"]
    detection = detect_task(train, config.task, config.columns)
    if isinstance(config.validation, str):
        held = read_table(config.validation)
    elif "validation" in tables:
        held = tables["validation"]
    else:
        parted, held = split_rows(train, detection, config.validation, config.seed)
        return parted, held, detection
    other = detect_task(held, detection.task, config.columns)
    if other.layout != detection.layout:
        raise DataError(
            f"{held.source} has the layout {other.layout}, {train.source} {detection.layout}; give both alike."
        )
    more = [other.columns[name] for name in other.columns if name not in detection.columns]
    if more:
        raise DataError(f"{held.source} has {quoted(more)} too, which {train.source} lacks; give both alike.")
    return train, _renamed(held, other, detection), detection


def _renamed(table: Table, own: Detection, wanted: Detection) -> Table:
    """Return the rows with their columns called as in the table that ``wanted`` was read off."""
    if own.columns == wanted.columns:
        return table
    rows = (
        Row(row.number, {wanted.columns[n]: row.fields.get(c) for n, c in own.columns.items()}) for row in table.rows
    )
    return Table(table.source, tuple(rows), table.unit)


def in_model_order(labels: tuple[str, ...], model: str | Path | nn.Module, revision: str | None) -> tuple[str, ...]:
    """Return the classes in the order of the model's own head, if it has one for exactly these classes."""
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        named = model.config.id2label if isinstance(model, PreTrainedModel) else None
    else:
        folder = local_folder(str(model))
        if folder is not None:
            check_folder(folder)
        named = config_values(str(folder or model), revision).get("id2label")
    own = tuple(str(name) for _, name in sorted((int(number), name) for number, name in (named or {}).items()))
    return own if sorted(own) == sorted(labels) else labels


def the_base(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    task: type[Task],
    labels: tuple[str, ...],
    config: TrainConfig,
    recipe: Recipe,
) -> Base:
    """Load the base by name, or take the model that was given.

    Raises:
        ConfigError: a model object without a tokenizer, or with settings for loading one.
        ModelError: a model that cannot be loaded, or not be used for this task.
        AdapterError: a model object that has adapters already.
    """
    if isinstance(model, nn.Module):
        return _given_base(model, tokenizer, task, labels, config, recipe)
    if tokenizer is not None:
        raise ConfigError(f"a tokenizer was given, but '{model}' is loaded with its own. Leave it out.")
    recipes.choose_device(config, recipe)
    folder = local_folder(str(model))
    if config.add_tokens:  # before the weights are loaded
        add_tokens(load_tokenizer(str(folder or model), config.revision, config.trust_remote_code), config.add_tokens)
    tensors = read_header(folder) if folder is not None and _has_weights(folder) else None
    count = None if tensors is None else sum(tensor.num_elements for tensor in tensors)
    stored = None if tensors is None else stored_dtype(tensors)
    recipes.choose_dtype(config, recipe, count, machine_bytes(), stored)
    return load_base(
        str(folder) if folder is not None else str(model),
        task.name,
        labels=labels,
        dtype=recipe.dtype,
        device=local_device(recipe.device),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
    )


def extended_base(base: Base, model: str | Path | nn.Module, config: TrainConfig, recipe: Recipe) -> Base:
    """Give a base that was loaded by name the tokens that are new to it; a model that was given stays as it is.

    Raises:
        ConfigError: tokens for a model object; or as :func:`lorakit.training.vocabulary.extended`.
    """
    if not isinstance(model, nn.Module):
        return extended(base, config, recipe)
    if config.add_tokens or config.train_vocabulary == "new":
        raise ConfigError(
            "add_tokens and train_vocabulary='new' cannot be set for a model object: it stays as it is. Give its name "
            "instead, or extend it yourself and name the rows, as in train_modules=['embed_tokens[32000:32010]']."
        )
    return dataclasses.replace(base, in_full=trained(base.model, None, config))


def _given_base(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    task: type[Task],
    labels: tuple[str, ...],
    config: TrainConfig,
    recipe: Recipe,
) -> Base:
    """Take a model object as it is; only a missing padding token is set, as loading by name does."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"fit takes the name of a model or a transformers model, not a {kind}. For any other torch model: "
            "lorakit.attach(model, ...), and a training loop of your own."
        )
    if tokenizer is None:
        raise ConfigError("a model object needs its tokenizer too: fit(model, rows, tokenizer=...).")
    asked = [name for name in ("device", "dtype") if getattr(config, name) != "auto"]
    asked += ["revision"] if config.revision is not None else []
    if asked:
        raise ConfigError(
            f"{quoted(asked)} cannot be set for a model object: it stays as it is. Give its name instead."
        )
    existing = handle_of(model)
    if existing is not None:
        raise AdapterError(
            f"the model has adapters already: {quoted(existing.names)}. Remove them first with "
            "lorakit.handle_of(model).detach(), or give the model's name instead."
        )
    task.check_model(model, labels)
    ensure_padding(model, tokenizer, required=bool(labels))
    parameter = next(model.parameters())
    words = {value: word for word, value in DTYPES.items()}
    recipe.device, recipe.dtype = str(parameter.device), words.get(parameter.dtype, "auto")
    recipe.say("device", recipe.device, "where the model is")
    recipe.say("dtype", str(parameter.dtype).removeprefix("torch."), "the model's own")
    return Base(model, tokenizer, model.config.name_or_path or kind, None, ())


def check_options(model: nn.Module, config: TrainConfig) -> None:
    """Refuse options that this model does not have.

    Raises:
        ConfigError: gradient checkpointing of a model without it; compiling without blocks or a compiler.
    """
    if config.compile:
        CompiledBlocks(model)
        check_compiler(next(model.parameters()).device.type)
    if config.grad_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing. Leave grad_checkpointing out.")


def check_space(output: str | None) -> None:
    """Refuse to begin where the disk could not even hold the result.

    Raises:
        TrainingError: less than 64 MiB are free.
    """
    if output is None:
        return
    place = existing_part(output)
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        raise TrainingError(
            f"only {free / 2**20:.0f} MiB are free at '{place}'; a run folder needs 64. Free some space."
        )


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _split_reason(config: TrainConfig, parted: bool) -> str:
    if isinstance(config.validation, str):
        return f"validation from '{config.validation}'"
    if not parted:
        return "the folder's own files"
    return f"{100 * config.validation:g} % held back, seed {config.seed}; equal inputs stay on one side"
