"""What a plan is about: a model's config, with weights and tokenizer or without, and encoded or imagined rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.bases import DTYPES
from lorakit.bases.header import read_header
from lorakit.bases.outline import stored_dtype
from lorakit.bases.source import load_config, local_folder, model_kind
from lorakit.bases.tokenizer import NO_LIMIT, load_tokenizer
from lorakit.bases.vocabulary import NewTokens
from lorakit.errors import ConfigError, ModelError
from lorakit.training.config import TrainConfig
from lorakit.training.data.encode import EncodedRow
from lorakit.training.data.layouts import CLASSIFICATION, LANGUAGE_MODELING
from lorakit.training.prepare import Rows, read_rows
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks import Task, find_task
from lorakit.training.vocabulary import extended_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IMAGINED_LABELS = ("0", "1")


@dataclass
class Named:
    """A model as it was named.

    Attributes:
        name: as asked for.
        source: the folder or hub name.
        config: its config.
        has_weights: its safetensors files are here.
    """

    name: str
    source: str
    config: PretrainedConfig
    has_weights: bool

    def stored(self) -> str | None:
        """Return the dtype most of its numbers are stored in by its files, else by its config; None if neither says."""
        folder = local_folder(self.source) if self.has_weights else None
        if folder is not None:
            return stored_dtype(read_header(folder))
        words = {value: word for word, value in DTYPES.items()}
        named = getattr(self.config, "dtype", None)
        return None if named is None else words.get(named)

    def tokenizer(self, config: TrainConfig) -> PreTrainedTokenizerBase:
        """Return its tokenizer.

        Raises:
            ModelError: it has none; says how to plan without.
        """
        try:
            return load_tokenizer(self.source, config.revision, config.trust_remote_code)
        except ModelError as error:
            raise ModelError(
                f"rows cannot be encoded without a tokenizer: {error} To plan from the config alone, leave DATA out "
                "and give --rows and --length."
            ) from error


@dataclass
class Subject:
    """Rows to train on, as the model would see them.

    Attributes:
        spec: the task.
        rows: what is trained on; imagined ones are all as long.
        num_held: rows to validate on.
        found: in words.
        new: tokens that are new to the model; its config counts them already.
    """

    spec: TaskSpec
    rows: Sequence[EncodedRow]
    num_held: int
    found: str
    new: NewTokens | None = None


def named(model: str | Path, config: TrainConfig) -> Named:
    """Find a model's config: in a folder, beside nothing else, or on the hub.

    Raises:
        ModelError: there is none.
    """
    path = Path(model).expanduser()
    folder = path.parent if path.is_file() and path.suffix == ".json" else local_folder(str(model))
    if folder is None:
        found = load_config(str(model), config.revision, config.trust_remote_code)
        return Named(str(model), str(model), found, _cached(str(model), config.revision))
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"'{folder}' holds an adapter, not a base model. Give the model that it belongs to.")
    file = path if path.is_file() else folder / "config.json"
    if not file.is_file():
        raise ModelError(f"'{folder}' has no config.json; a plan needs at least that.")
    found = load_config(str(file), None, config.trust_remote_code)
    return Named(str(model), str(folder), found, any(folder.glob("*.safetensors")))


def subject(
    model: Named, rows: Rows | None, config: TrainConfig, num_rows: int, length: int | None
) -> tuple[Subject, PreTrainedTokenizerBase | None]:
    """Encode the rows, or imagine ``num_rows`` of ``length`` tokens.

    Raises:
        InputError: rows or tokenizer are wrong, or a length is missing or above the model's context.
    """
    if rows is None:
        return _imagined(model, config, num_rows, length), None
    train, held, detection = read_rows(rows, config)
    task = find_task(detection.task)
    tokenizer = model.tokenizer(config)
    inner = model.config.get_text_config()
    new = extended_tokenizer(tokenizer, int(inner.vocab_size), config)
    if new is not None:
        inner.vocab_size = max(int(inner.vocab_size), new.ids[-1] + 1)
    _check(model, task)
    _pad(tokenizer)
    labels = task.labels({"train": train, "validation": held}, detection)
    spec = TaskSpec(detection.task, labels, _max_length(model, task, config, tokenizer), layout=detection.layout)
    spec = task.fitted(spec, _OnlyConfig(model.config), tokenizer)
    encoded = spec.encode(train, detection, tokenizer)
    found = f"{detection.task}, {len(encoded.rows):,} rows of {train.source}"
    return Subject(spec, encoded.rows, len(held.rows), found, new), tokenizer


@dataclass
class _OnlyConfig:
    """A model of which a task asks the config alone."""

    config: Any


def _imagined(model: Named, config: TrainConfig, num_rows: int, length: int | None) -> Subject:
    if length is None:
        raise ConfigError("without DATA a plan needs the tokens of a row: give --length, and --rows.")
    context = _context(model.config)
    if length > context:
        raise ConfigError(f"length {length:,} is above the model's context of {context:,} tokens.")
    classifies = any("SequenceClassification" in name for name in model.config.architectures or ())
    usual = CLASSIFICATION if classifies or model_kind(model.config) == "encoder" else LANGUAGE_MODELING
    task = find_task(config.task or usual)
    _check(model, task)
    labels = IMAGINED_LABELS if task.name == CLASSIFICATION else ()
    two_sides = bool(model.config.is_encoder_decoder)
    spec = TaskSpec(task.name, labels, length, encoder_decoder=two_sides)
    new, inner = None, model.config.get_text_config()
    if config.add_tokens:
        count, start = len(config.add_tokens), int(inner.vocab_size)
        inner.vocab_size = start + count
        new = NewTokens(tuple(config.add_tokens), tuple(range(start, start + count)), ((),) * count)
    row = EncodedRow([0] * length, 0 if labels else [0] * length, 1, "", "")
    found = f"{task.name}, {num_rows:,} rows of {length:,} tokens"
    return Subject(spec, [row] * num_rows, num_rows // 10, found, new)


def _check(model: Named, task: type[Task]) -> None:
    if task.name != CLASSIFICATION and model_kind(model.config) == "encoder":
        raise ModelError(
            f"'{model.name}' is an encoder: it reads text but does not write it; it cannot do {task.name}."
        )


def _max_length(model: Named, task: type[Task], config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    context = min(_context(model.config), int(tokenizer.model_max_length))
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"max_length {config.max_length:,} is above the model's context of {context:,} tokens.")
    return config.max_length or min(context, task.usual.max_length)


def _context(config: PretrainedConfig) -> int:
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else NO_LIMIT


def _pad(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def _cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
