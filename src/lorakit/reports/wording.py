"""How numbers, sizes and texts are written in every report."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

ABSENT = "n/a"
_SIZE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def percent(share: float | None) -> str:
    """Write a share of 1: ``0.9467`` becomes ``94.7 %``; small ones keep two digits that count."""
    if share is None or not math.isfinite(share):
        return ABSENT
    scaled = 100.0 * share
    if scaled == 0.0 or abs(scaled) >= 9.95:
        return f"{scaled:.1f} %"
    return f"{scaled:.2f} %" if abs(scaled) >= 0.095 else f"{scaled:.2g} %"


def points(difference: float) -> str:
    """Write a difference of two shares in percentage points, always with its sign."""
    return f"{100.0 * difference:+.1f}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number with ``digits`` decimals; a large or tiny one in scientific form."""
    if value is None or math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "infinite"
    if value != 0.0 and not 0.5 * 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """Write a number with three digits that count: ``1234.5`` -> ``1,230``, ``0.01234`` -> ``0.0123``."""
    if value is None or not math.isfinite(value):
        return decimal(value)
    if value == 0.0 or 1e-3 <= abs(value) < 1e6:
        exponent = math.floor(math.log10(abs(value))) if value else 0
        return f"{round(value, 2 - exponent):,.{max(0, 2 - exponent)}f}"
    return f"{value:.2e}"


def count(number: int | float) -> str:
    """Write a count with thousands separated: ``22,713,216``."""
    return f"{number:,.0f}"


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Write a count with its noun: ``1 row``, ``2,500 rows``; with the ending 'es' ``3 classes``."""
    return f"{count(number)} {noun}{'' if number == 1 else ending}"


def size(num_bytes: int) -> str:
    """Write a size in the binary unit that fits: ``2.81 MiB``."""
    value = float(num_bytes)
    unit = 0
    while value >= 1024.0 and unit < len(_SIZE_UNITS) - 1:
        value /= 1024.0
        unit += 1
    return f"{count(value)} {_SIZE_UNITS[unit]}" if unit == 0 else f"{significant(value)} {_SIZE_UNITS[unit]}"


def mebibytes(num_bytes: int) -> str:
    """Write a size in MiB, whatever it is, so that runs can be compared."""
    return f"{num_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Write a time span: ``48.2 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def model_name(name: str) -> str:
    """Write a model's name as a title: a hub's name whole, of a long path its last two folders.

    >>> model_name("/data/some/where/models/tiny-llama")
    '…/models/tiny-llama'
    """
    parts = name.rstrip("/").split("/")
    return name if len(parts) <= 3 and len(name) <= 60 else shortened("…/" + "/".join(parts[-2:]), 60)


def shortened(text: str, length: int) -> str:
    """Cut ``text`` to ``length`` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def printable(text: str) -> str:
    """Replace control characters, which could steer a terminal; newlines stay, tabs become spaces."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs")
        else (" " if character == "\t" else "\N{REPLACEMENT CHARACTER}")
        for character in text.replace("\r\n", "\n")
    )


def method_name(method: dict[str, Any]) -> str:
    """Write a method's name as papers do: ``lora`` -> ``LoRA``, ``adalora`` -> ``AdaLoRA``."""
    name = str(method.get("name", "adapter"))
    if name.islower() and len(name) >= 4 and name.endswith("ora"):
        return f"{name[:-4].capitalize()}{name[-4].upper()}oRA"
    return name


MOST_PATTERNS = 4


def _setting(value: Any) -> Any:
    """Write a value; patterns that name many layers by their number and range."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_PATTERNS and "name" not in value:
        numbers = sorted(float(each) for each in value.values())
        return f"{numbers[0]:g} to {numbers[-1]:g} by {len(value):,} patterns"
    return value.get("name", value)


def method_settings(method: dict[str, Any]) -> str:
    """Write a method's settings: ``rank 8, alpha 16, init kaiming``; empty ones are left out."""
    named = {key: _setting(value) for key, value in method.items() if key != "name"}
    empty: tuple[Any, ...] = (None, "", [], {})
    return ", ".join(f"{key} {value}" for key, value in named.items() if value not in empty)
