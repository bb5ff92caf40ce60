"""``lorakit compress RUN``: cut a trained adapter to fewer numbers."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.compose.selection import Selection


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Cut a run's adapter to fewer numbers.",
        epilog="Example: lorakit compress runs/first --energy 0.99 --output runs/first-small",
    )(compress)


def compress(
    run: options.RunFolder,
    output_: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The new folder; nothing is replaced.")],
    energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Keep this share of all layers' energy, such as 0.99."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep so many numbers, over all layers.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, metavar="K", help="Keep rank K of every layer.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Cut the updates of RUN where they have least, over all layers at once, and write a folder like a run's.

    `lorakit spectrum RUN` shows beforehand what each layer uses. The error is predicted, then measured.
    """
    from lorakit.cli.progress import Watch
    from lorakit.reports.compression import compression_table, size_line
    from lorakit.training.compressing import as_json as plain
    from lorakit.training.compressing import compress_run

    selection = read_selection(energy, budget, rank)
    with Watch() as watch:
        watch.stage("compressing")
        report = compress_run(run, output_, selection)
    if as_json:
        output.show_json(plain(report))
        return
    output.show(compression_table(report))
    print(f"\n{size_line(report)}")
    for remark in report.found.notes:
        output.note(remark)
    place = shlex.quote(output_)
    print(f"Adapter  {output_}\n\nNext\n  lorakit eval {place} test.jsonl\n  lorakit spectrum {place}")


def read_selection(energy: float | None, budget: int | None, rank: int | None) -> Selection:
    """Return what is to be kept.

    Raises:
        ConfigError: not exactly one of the three is given, or it is out of range.
    """
    from lorakit.compose.selection import KeepEnergy, KeepNumbers, KeepRank

    given = {"--energy": energy, "--budget": budget, "--rank": rank}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = f"{' and '.join(named)} are given" if named else "none is given"
        raise ConfigError(f"say how much to keep with one of --energy, --budget and --rank: {found}.")
    if energy is not None:
        return KeepEnergy(share=energy)
    return KeepNumbers(budget=budget) if budget is not None else KeepRank(rank=rank)  # type: ignore[arg-type]
