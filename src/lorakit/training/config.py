"""``TrainConfig``: everything a run can be told. What is None is chosen by the recipe, with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lorakit.errors import ConfigError, did_you_mean
from lorakit.methods import Method, find_method, method_names
from lorakit.settings import Settings

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
TaskName = Literal["classification", "generation", "language-modeling"]


class TrainConfig(Settings):
    """The settings of a run; the command line's flags, the YAML file's keys and ``fit``'s arguments.

    Attributes:
        task: 'classification', 'generation' or 'language-modeling'; None reads it off the columns.
        method: a method's name, or its name and fields.
        rank, alpha: shorthands for the method's fields.
        targets, exclude, layers: which layers, as ``lorakit.attach`` takes them.
        train_modules: modules trained in full, beside a new head.
        epochs: passes over the training rows; ``max_steps`` ends the run earlier.
        lr: peak learning rate; it warms up over the first 6 % of the steps and falls linearly to 0.
        batch_size: rows per optimizer step; ``micro_batch`` of them at a time in memory.
        weight_decay, clip_norm: of AdamW, and the largest gradient norm.
        validation: a file of rows to validate on, or the share of the rows to split off.
        max_length: tokens per row; None takes the model's context (at most 512 for classification).
        dtype: of the base's weights: 'fp32', 'bf16', 'fp16'; ``device``: 'cpu', 'cuda', ...
        seed: of the split, the order, the head and the adapter.
        revision, trust_remote_code: for models from a hub.
        output: the run folder; ``force`` replaces an existing one.
    """

    task: TaskName | None = None
    method: str | dict[str, Any] = "lora"
    rank: Count | None = None
    alpha: Positive | None = None
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] | None = None
    layers: str | list[int] | None = None
    train_modules: str | list[str] = Field(default_factory=list)
    epochs: Positive | None = None
    max_steps: Count | None = None
    lr: Positive | None = None
    batch_size: Count | None = None
    micro_batch: Count | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Positive = 1.0
    validation: Annotated[float, Field(gt=0, lt=1)] | str = 0.1
    max_length: Annotated[int, Field(ge=8)] | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    revision: str | None = None
    trust_remote_code: bool = False
    output: str | None = None
    force: bool = False

    @field_validator("output", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("method", mode="after")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        """Refuse an unknown method together with whatever else is wrong."""
        name = value if isinstance(value, str) else str(value.get("name", ""))
        if name.lower() not in [known.lower() for known in method_names()]:
            near = did_you_mean(name, method_names())
            raise ValueError(f"no method '{name}'.{near} Known: {', '.join(method_names())}")
        return value

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_file(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError("give a share of the rows between 0 and 1, or a file")
        return value

    def resolved_method(self) -> Method:
        """Return the method with the shorthands applied.

        Raises:
            ConfigError: no such method, or a field it does not have.
        """
        shorthands = {k: v for k, v in (("rank", self.rank), ("alpha", self.alpha)) if v is not None}
        given = {"name": self.method} if isinstance(self.method, str) else dict(self.method)
        twice = sorted(set(shorthands) & set(given))
        if twice:
            raise ConfigError(f"{', '.join(twice)} is set twice: beside the method and inside it. Set it once.")
        return find_method({**given, **shorthands})


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
