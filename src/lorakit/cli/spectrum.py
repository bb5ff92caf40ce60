"""``lorakit spectrum RUN``: what is inside an adapter's updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.records import AdapterSpectrum


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Look inside the updates of a run.",
        epilog="Example: lorakit spectrum runs/first --picture layers.png",
    )(spectrum)


def spectrum(
    run: options.RunFolder,
    other: Annotated[
        str | None,
        typer.Option(metavar="RUN2", help="Another run or PEFT folder to compare with, layer by layer."),
    ] = None,
    base: options.BaseModel = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Read the adapter alone.")] = False,
    top: Annotated[int, typer.Option(min=0, metavar="K", help="Layers to list, the largest updates first.")] = 5,
    show_all: Annotated[bool, typer.Option("--all", help="List all layers.")] = False,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also draw the layers into this file.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what each update learned: rank it uses, energy kept at lower ranks, size, and how it lies to the base.

    Sizes relative to the base and shares inside its directions read the base's weights; the rest the adapter's file.
    """
    from pathlib import Path

    from lorakit.cli.progress import Watch
    from lorakit.reports.spectrum_run import read_spectrum

    if base is not None and no_base:
        raise ConfigError("--base and --no-base say opposite things. Leave one of them out.")
    if picture is not None and Path(picture).suffix.lower() != ".png":
        raise ConfigError(f"--picture '{picture}': the picture is a PNG. Give a file name that ends with .png.")
    with Watch() as watch:
        found = read_spectrum(
            run, other, base, use_base=not no_base, trust_remote_code=trust_remote_code, stage=watch.stage
        )
        if picture is not None:
            from lorakit.reports.spectrum_figure import write_picture

            watch.stage("drawing")
            write_picture(found, picture)
    if as_json:
        from lorakit.reports.spectrum import as_json as plain

        output.show_json(plain(found))
    else:
        show(found, None if show_all else top)
    if picture is not None and not as_json:
        print(f"\nPicture  {picture}")


def show(found: AdapterSpectrum, top: int | None) -> None:
    """Print what was found; ``top`` layers of it by name, None for all."""
    from lorakit.reports import wording
    from lorakit.reports.spectrum_table import spectrum_tables

    print(f"{found.folder}: {wording.method_name(found.method)}, {wording.method_settings(found.method)}")
    print(f"Base     {found.base if found.base is not None else 'not read'}")
    if found.base_missing is not None:
        output.note(found.base_missing)
    for remark in found.notes:
        output.note(remark)
    output.show(spectrum_tables(found, top))
