"""``lorakit methods``: the fine-tuning methods there are."""

from __future__ import annotations

import typer

from lorakit.cli import options, output


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(short_help="List the fine-tuning methods.", epilog="Example: lorakit methods")(methods)


def methods(as_json: options.AsJson = False) -> None:
    """List the fine-tuning methods, with the settings a config file can give them."""
    from lorakit.methods.method import method_types

    found = [
        {"name": kind.name, "about": (kind.__doc__ or "").strip().splitlines()[0], "settings": list(kind.model_fields)}
        for kind in method_types()
    ]
    if as_json:
        output.show_json(found)
        return
    for entry in found:
        print(f"{entry['name']}\n  {entry['about']}\n  settings: {', '.join(entry['settings'])}")
