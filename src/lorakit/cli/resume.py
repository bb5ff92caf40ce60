"""``lorakit resume RUN``: go on with a training that was interrupted."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakit.cli import options
from lorakit.cli.train import watched

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The run folder of an interrupted `lorakit train`.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: lorakit resume runs/first",
        short_help="Go on with an interrupted training.",
    )(resume)


def resume(run: Run, as_json: options.TrainJson = False, quiet: options.Quiet = False) -> None:
    """Go on with RUN from its last whole checkpoint, with the settings, the rows and the model it was begun with.

    The losses and the adapter are those of a run that was never interrupted.
    """
    from lorakit.training.fit import resume as go_on

    watched(lambda watch: go_on(run, observer=watch), run, as_json, quiet)
