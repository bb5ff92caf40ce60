"""Frozen, strictly checked values: what methods and configs are made of.

An unknown field, a wrong type or a value out of range is a :class:`ConfigError` that names every
problem found, with the nearest known name. Impossible values cannot be constructed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from lorakit.errors import ConfigError, bullet_list, did_you_mean


class Settings(pydantic.BaseModel):
    """Base of every config value: immutable, compared by content, no unknown fields.

    Raises:
        ConfigError: on construction, naming every wrong field.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    if not TYPE_CHECKING:  # the checker reads the fields' types; at run time errors become ours

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except pydantic.ValidationError as error:
                raise ConfigError(f"{type(self).__name__}: {describe(type(self), error)}") from None

    def __hash__(self) -> int:
        return hash((type(self), _hashable({name: getattr(self, name) for name in type(self).model_fields})))

    def replaced(self, **changes: Any) -> Any:
        """Return a copy with some fields changed, checked like a new value."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _hashable(value: Any) -> Any:
    """Return a value that hashes alike for equal contents, whatever the order of a mapping's keys."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    return value


def describe(kind: type[pydantic.BaseModel], error: pydantic.ValidationError) -> str:
    """Say every problem of a validation error in words, unknown names with the nearest known ones."""
    problems = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = did_you_mean(str(item["loc"][-1]), kind.model_fields)
            problems.append(f"unknown field '{place}'.{near} Known: {', '.join(kind.model_fields)}.")
        elif item["type"] == "missing":
            problems.append(f"field '{place}' is missing.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{place}: {message} (found {item['input']!r})" if place else message)
    return bullet_list(problems)
