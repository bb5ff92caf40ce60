"""Which column holds which field, as a user says it: ``prompt=question,completion=answer``."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.errors import ConfigError, did_you_mean, quoted
from lorakit.training.data.layouts import FIELDS


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read ``field=column`` pairs parted by commas; ``field=`` leaves a field out though a column has its name.

    Raises:
        ConfigError: a pair is none, a field is given twice or unknown (all named).
    """
    if text is None or not text.strip():
        return None
    pairs = [part.strip() for part in text.split(",") if part.strip()]
    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise ConfigError(f"columns: {quoted(broken)} is not 'field=column'. As in: prompt=question,completion=answer.")
    parted = [(field.strip(), column.strip()) for field, _, column in (pair.partition("=") for pair in pairs)]
    twice = sorted({field for field, _ in parted if sum(field == other for other, _ in parted) > 1})
    if twice:
        raise ConfigError(f"columns: {quoted(twice)} is given twice.")
    check_fields(dict(parted))
    return dict(parted)


def check_fields(columns: Mapping[str, str]) -> None:
    """Refuse fields that no layout has.

    Raises:
        ConfigError: some are unknown (all named).
    """
    unknown = [field for field in columns if field not in FIELDS]
    if unknown:
        near = "".join(did_you_mean(field, FIELDS) for field in unknown[:3])
        raise ConfigError(f"columns: no layout has the field {quoted(unknown)}. Fields: {quoted(FIELDS, 20)}.{near}")
