"""``TrainConfig``: everything a run can be told. What is None is chosen by the recipe, with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from lorakit.errors import ConfigError, did_you_mean, quoted
from lorakit.inits import find_init
from lorakit.methods import Method, find_method
from lorakit.methods.lora import RankOrAuto
from lorakit.methods.method import type_named
from lorakit.settings import Settings
from lorakit.training.schedule import WARMUP_SHARE
from lorakit.training.tasks import task_names

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
OptimizerName = Literal["adamw", "sgd", "adafactor"]
ScheduleName = Literal["linear", "cosine", "constant"]

SHORTHANDS = ("rank", "alpha", "init", "budget")
"""Fields of the method that may stand beside it."""


class TrainConfig(Settings):
    """The settings of a run; the command line's flags, the YAML file's keys and ``fit``'s arguments.

    Attributes:
        task: a task's name, such as 'classification'; None reads it off the columns.
        method: a method's name, or its name and fields.
        rank, alpha, init, budget: shorthands for the method's fields.
        targets, exclude, layers: which layers, as ``lorakit.attach`` takes them.
        train_modules: modules trained in full, beside a new head.
        add_tokens: tokens that the tokenizer and the model learn first; also a file with one in each line.
        train_vocabulary: what of embedding and head is trained beside the adapter: the rows of 'new' tokens, which is
            usual where there are any, all of them in 'full', or 'none'.
        columns: which column of the rows is which field, where their names do not say: ``{"prompt": "question"}``.
        epochs: passes over the training rows; ``max_steps`` ends the run earlier.
        lr: peak learning rate.
        optimizer: 'adamw', 'sgd' (with momentum 0.9) or 'adafactor'.
        schedule: how the rate goes on after the warm-up: 'linear' or 'cosine' to 0, or 'constant'.
        warmup: over how many steps the rate rises: below 1 a share of them all, else their number.
        batch_size: rows per optimizer step; ``micro_batch`` of them at a time in memory.
        halve_micro_at: the step from which micro-batches are half as large; written by a run that ran out of memory.
        weight_decay, clip_norm: of the optimizer, and the largest gradient norm.
        eval_every: steps between two evaluations on the validation rows; None takes the epochs.
        save_every: steps between two checkpoints; None saves after each evaluation and every ten minutes.
        keep: how many of the last checkpoints are kept, beside the best: with two, a damaged one has one before it.
        patience: end the run after so many evaluations without a better one; None goes on to the end.
        packing: several examples in one sequence, none of which sees another: 'on', 'off', or 'auto' where it pays.
        cache_prefix: keep what frozen blocks below all that is trained give for each row on disk, and leave them out of
            every later pass.
        grad_checkpointing: save memory by computing activations twice.
        recompute: make what cheap operations made again in the backward pass, to the bit, instead of keeping it: 'on',
            'off', or 'auto' where memory is not ample.
        compile: run the model's blocks through ``torch.compile``: faster steps after a while of compiling.
        validation: a file of rows to validate on, or the share of the rows to split off.
        max_length: tokens per row; None takes the model's context (at most 512 for classification).
        dtype: of the base's weights: 'fp32', 'bf16', 'fp16'; ``device``: 'cpu', 'cuda', ...
        seed: of the split, the order, the head and the adapter.
        revision, trust_remote_code: for models from a hub.
        log_to: trackers that get the metrics too, by accelerate's names for them: 'tensorboard', 'wandb', ...
        output: the run folder; ``force`` replaces an existing one.
    """

    task: str | None = None
    method: str | dict[str, Any] = "lora"
    rank: RankOrAuto | None = None
    alpha: Positive | None = None
    init: str | dict[str, Any] | None = None
    budget: Count | None = None
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    layers: str | list[int] | None = None
    train_modules: str | list[str] = Field(default_factory=list)
    add_tokens: list[str] | None = None
    train_vocabulary: Literal["new", "full", "none"] | None = None
    columns: dict[str, str] | None = None
    epochs: Positive | None = None
    max_steps: Count | None = None
    lr: Positive | None = None
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "linear"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = WARMUP_SHARE
    batch_size: Count | None = None
    micro_batch: Count | None = None
    halve_micro_at: Count | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Positive = 1.0
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2
    patience: Count | None = None
    packing: Literal["auto", "on", "off"] = "auto"
    cache_prefix: bool = False
    grad_checkpointing: bool = False
    recompute: Literal["auto", "on", "off"] = "auto"
    compile: bool = False
    validation: Annotated[float, Field(gt=0, lt=1)] | str = 0.1
    max_length: Annotated[int, Field(ge=8)] | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    revision: str | None = None
    trust_remote_code: bool = False
    log_to: str | list[str] | None = None
    output: str | None = None
    force: bool = False

    @field_validator("output", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("packing", "recompute", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """Take YAML's bare ``on`` and ``off``, which are truth values there."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("task", mode="after")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value is not None and value not in task_names():
            near = did_you_mean(value, task_names())
            raise ValueError(f"no task '{value}'.{near} Known: {', '.join(task_names())}")
        return value

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _tokens(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            value = parse_tokens(str(value))
        if isinstance(value, (list, tuple)):
            value = list(value)
            twice = sorted({str(token) for token in value if value.count(token) > 1})
            if not value or "" in value:
                raise ValueError("there is no token in it; give one per line, or leave the setting out")
            if twice:
                raise ValueError(f"twice the same token: {quoted(twice)}. Name each once")
        return value

    @field_validator("warmup", mode="after")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and not float(value).is_integer():
            raise ValueError("give a share of the steps below 1, or a whole number of steps")
        return value

    @field_validator("method", mode="after")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        """Refuse an unknown method together with whatever else is wrong."""
        name = value if isinstance(value, str) else str(value.get("name", ""))
        try:
            type_named(name)
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return value

    @field_validator("init", mode="after")
    @classmethod
    def _known_init(cls, value: Any) -> Any:
        """Refuse an unknown init together with whatever else is wrong."""
        try:
            if value is not None:
                find_init(value)
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return value

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_file(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError("give a share of the rows between 0 and 1, or a file")
        return value

    @model_validator(mode="after")
    def _one_who_makes_again(self) -> Self:
        if self.compile and self.recompute == "on":
            raise ValueError("recompute 'on' and compile: the compiler decides what is made again. Leave one out")
        return self

    def attaching(self, heads: Sequence[str]) -> dict[str, Any]:
        """Return how the adapter is put on a model, as ``lorakit.attach`` takes it; ``heads`` train in full too."""
        extra = [self.train_modules] if isinstance(self.train_modules, str) else list(self.train_modules)
        return {
            "targets": self.targets,
            "exclude": self.exclude,
            "layers": self.layers,
            "train_modules": [*heads, *(name for name in extra if name not in heads)],
            "seed": self.seed,
        }

    def resolved_method(self) -> Method:
        """Return the method with the shorthands applied.

        Raises:
            ConfigError: no such method, or a field it does not have.
        """
        shorthands = {name: value for name in SHORTHANDS if (value := getattr(self, name)) is not None}
        given = {"name": self.method} if isinstance(self.method, str) else dict(self.method)
        twice = sorted(set(shorthands) & set(given))
        if twice:
            raise ConfigError(f"{', '.join(twice)} is set twice: beside the method and inside it. Set it once.")
        return find_method({**given, **shorthands})


class RunConfig(TrainConfig):
    """The settings of a run with its model and its rows, as ``config.yaml`` in the run folder says them.

    Attributes:
        model: folder or hub name of the base; None for a model that was given as an object.
        data: the file or folder of examples; None for rows that were given as objects.
    """

    model: str | None = None
    data: str | None = None


def parse_tokens(value: str) -> list[str]:
    """Read tokens from a text file, one in each line, or from a list with commas.

    Raises:
        ValueError: a file that is not there, or that is not UTF-8 text.
    """
    file = Path(value).expanduser()
    if file.is_file():
        try:
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"'{value}' is not UTF-8 text; give a file with one token per line") from None
    if file.suffix == ".txt" or (value.strip() and file.is_dir()):
        raise ValueError(f"there is no file '{value}'; give a file with one token per line, or tokens with commas")
    return [token.strip() for token in value.split(",") if token.strip()]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings; keys are checked by :class:`TrainConfig`.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error.strerror}.") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file '{path}' is not YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config file '{path}' holds a {type(value).__name__}; it needs 'key: value' lines.")
    return {str(key): item for key, item in value.items()}


def write_config(values: Mapping[str, Any]) -> str:
    """Return settings as YAML, in the order given."""
    import yaml

    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text
