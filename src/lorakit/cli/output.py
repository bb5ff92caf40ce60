"""Where a command's words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def results() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False)


def progress() -> Console:
    """Return the console for progress, notes and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def show(*parts: RenderableType) -> None:
    """Print tables and texts as results; a text is never read as markup."""
    from rich.text import Text

    console = results()
    for part in parts:
        console.print(Text(part, overflow="fold") if isinstance(part, str) else part)


def show_json(value: Any) -> None:
    """Print one JSON value; a number that is not finite becomes null, since JSON has none."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def show_json_line(value: Any) -> None:
    """Print one JSON value on one line."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def say_json(value: Any) -> None:
    """Write one JSON value on one line to stderr; a number that is not finite becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), file=sys.stderr, flush=True)


def say(text: str, prefix: str = "lorakit: ") -> None:
    """Write a line to stderr, unwrapped, so that paths and commands can be copied."""
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Write a remark that the user should read to stderr."""
    say(text, "note: ")


class NoteHandler(logging.Handler):
    """Shows what the library logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        note(record.getMessage())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
