"""From a model's name and rows to everything a run needs; every check that can be made is made here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lorakit.bases import Base, context_length, is_chat_model, load_base, model_kind
from lorakit.bases.header import read_header
from lorakit.bases.source import local_folder
from lorakit.errors import ConfigError, DataError, TrainingError
from lorakit.methods import Method
from lorakit.training import recipe as recipes
from lorakit.training.config import TrainConfig
from lorakit.training.data.detect import check_rows, detect_task
from lorakit.training.data.encode import EncodedRow
from lorakit.training.data.layouts import CLASSIFICATION, GENERATION, Detection
from lorakit.training.data.read import read_splits, read_table, table_from_rows
from lorakit.training.data.split import label_names, split_rows
from lorakit.training.data.table import Table
from lorakit.training.memory import machine_bytes
from lorakit.training.observe import Observer
from lorakit.training.recipe import Recipe
from lorakit.training.spec import TaskSpec

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
    train: tuple[EncodedRow, ...]
    held: tuple[EncodedRow, ...]
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
    recipe = Recipe()
    observer.stage("reading the data")
    train, held, detection = read_rows(rows, config)
    recipe.say("task", detection.task, "as asked" if config.task else detection.reason)
    labels = label_names({"train": train, "validation": held}, detection) if detection.task == CLASSIFICATION else ()
    recipes.choose_device(config, recipe)
    observer.stage("loading the model")
    base = the_base(model, tokenizer, detection.task, labels, config, recipe)
    context = context_length(base.model, base.tokenizer)
    recipes.choose_length(config, recipe, detection.task, context)
    writes = detection.task == GENERATION
    spec = TaskSpec(
        task=detection.task,
        labels=labels,
        max_length=recipe.max_length,
        chat=writes and (detection.layout == "messages" or is_chat_model(base.tokenizer, base.model)),
        encoder_decoder=writes and model_kind(base.model.config) == "encoder-decoder",
        layout=detection.layout,
    )
    observer.stage("encoding the rows")
    encoded, encoded_held = spec.encode(train, detection, base.tokenizer), spec.encode(held, detection, base.tokenizer)
    if detection.task == GENERATION:
        spec = dataclasses.replace(spec, separator=encoded.separator)
    recipe.say(
        "rows", f"{len(encoded.rows):,} train, {len(encoded_held.rows):,} validation", _split_reason(config, rows)
    )
    width = int(base.model.config.get_text_config().hidden_size)
    count = sum(parameter.numel() for parameter in base.model.parameters())
    recipes.choose_steps(config, recipe, detection.task, len(encoded.rows), width, count)
    notes = [*encoded.notes, *encoded_held.notes]
    return Prepared(base, method, spec, encoded.rows, encoded_held.rows, recipe, notes)


def read_rows(rows: Rows, config: TrainConfig) -> tuple[Table, Table, Detection]:
    """Return training rows, validation rows, and what they are examples of."""
    tables = read_splits(rows) if isinstance(rows, (str, Path)) else {"train": table_from_rows(rows)}
    train = tables["train"]
    detection = detect_task(train, config.task)
    check_rows(train, detection)
    if isinstance(config.validation, str):
        held = read_table(config.validation)
    elif "validation" in tables:
        held = tables["validation"]
    else:
        parted, held = split_rows(train, detection, config.validation, config.seed)
        return parted, held, detection
    other = detect_task(held, detection.task)
    check_rows(held, other)
    if other.layout != detection.layout:
        raise DataError(
            f"{held.source} has the layout {other.layout}, {train.source} {detection.layout}; give both alike."
        )
    return train, held, detection


def the_base(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    labels: tuple[str, ...],
    config: TrainConfig,
    recipe: Recipe,
) -> Base:
    """Load the base by name, or take the model that was given.

    Raises:
        ConfigError: a model object without a tokenizer.
    """
    if isinstance(model, nn.Module):
        given: Any = model
        if tokenizer is None:
            raise ConfigError("a model object needs its tokenizer too: fit(model, rows, tokenizer=...).")
        if task == CLASSIFICATION and given.config.num_labels != len(labels):
            raise ConfigError(
                f"the model has {given.config.num_labels} classes, the rows {len(labels)}: {', '.join(labels)}. "
                "Load it with num_labels to match, or give its name instead."
            )
        parameter = next(given.parameters())
        recipe.device, recipe.dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
        return Base(given, tokenizer, given.config.name_or_path or type(given).__name__, None, ())
    folder = local_folder(str(model))
    count = (
        sum(tensor.num_elements for tensor in read_header(folder))
        if folder is not None and _has_weights(folder)
        else None
    )
    recipes.choose_dtype(config, recipe, count, machine_bytes())
    return load_base(
        str(folder) if folder is not None else str(model),
        task,
        labels=labels,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
    )


def check_space(output: str | None) -> None:
    """Refuse to begin where the disk could not even hold the result.

    Raises:
        TrainingError: less than 64 MiB are free.
    """
    if output is None:
        return
    place = Path(output).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE_BYTES:
        raise TrainingError(
            f"only {free / 2**20:.0f} MiB are free at '{place}'; a run folder needs 64. Free some space."
        )


def resolved(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """Return the settings as decided, ready for ``config.yaml``; training with them again is the same run."""
    recipe = prepared.recipe
    values: dict[str, Any] = json.loads(config.model_dump_json(exclude={"output", "force", "rank", "alpha"}))
    values.update(
        task=prepared.spec.task,
        method=prepared.method.summary(),
        epochs=recipe.epochs,
        lr=recipe.lr,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        max_length=recipe.max_length,
        dtype=recipe.dtype,
        device=recipe.device,
    )
    return values


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _split_reason(config: TrainConfig, rows: Rows) -> str:
    if isinstance(config.validation, str):
        return f"validation from '{config.validation}'"
    if isinstance(rows, (str, Path)) and Path(rows).is_dir():
        return "the folder's own files"
    return f"{100 * config.validation:g} % held back, seed {config.seed}; equal inputs stay on one side"
