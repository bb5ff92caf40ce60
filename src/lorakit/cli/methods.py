"""``lorakit methods``: the fine-tuning methods there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from lorakit.cli import options, output


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(short_help="List the fine-tuning methods.", epilog="Example: lorakit methods")(methods)


def methods(as_json: options.AsJson = False) -> None:
    """List the fine-tuning methods and the starts (--init), with the settings a config file can give them."""
    from lorakit.inits.init import init_types
    from lorakit.methods.method import aliases_of, method_types

    found: list[dict[str, Any]] = [
        {
            "name": kind.name,
            "aliases": {alias: dict(fields) for alias, fields in aliases_of(kind).items()},
            "about": (kind.__doc__ or "").strip().splitlines()[0],
            "settings": list(kind.model_fields),
        }
        for kind in method_types()
    ]
    starts = [
        {"name": kind.name, "about": (kind.__doc__ or "").strip().splitlines()[0], "settings": list(kind.model_fields)}
        for kind in init_types()
    ]
    if as_json:
        output.show_json({"methods": found, "inits": starts})
        return
    for entry in found:
        also = "".join(f"\n  also called: {_spelled(*alias)}" for alias in entry["aliases"].items())
        print(f"{entry['name']}\n  {entry['about']}{also}\n  settings: {', '.join(entry['settings']) or 'none'}")
    print("\nStarts of a pair, for --init:")
    for entry in starts:
        settings = f" ({', '.join(entry['settings'])})" if entry["settings"] else ""
        print(f"{entry['name']}{settings}\n  {entry['about']}")


def _spelled(alias: str, fields: Mapping[str, Any]) -> str:
    """Write an alias with the settings that it means."""
    meant = ", ".join(f"{key}={value}" for key, value in fields.items())
    return f"{alias} (with {meant})" if meant else alias
