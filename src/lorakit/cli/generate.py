"""``lorakit generate RUN PROMPT``: write on from a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorakit.cli import options, output


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Write on from a prompt.",
        epilog='Example: lorakit generate runs/first "Write a greeting." --max-new-tokens 40',
    )(generate)


def generate(
    run: options.RunFolder,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.", show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, draws one.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the drawing; the same seed writes the same.")] = None,
    base: options.BaseModel = None,
    device: options.Device = "auto",
    dtype: options.BaseDtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Write on from PROMPT, in the form that the run was trained on, as it comes."""
    from lorakit.cli.progress import Watch
    from lorakit.training.runs import open_run

    with Watch() as watch:
        watch.stage("loading the run")
        opened = open_run(run, base, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    given = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    pieces = []
    for piece in opened.stream(given, max_new_tokens, temperature, seed):
        pieces.append(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not as_json:
        print()
        return
    output.show_json(
        {
            "run": run,
            "prompt": given,
            "text": "".join(pieces),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }
    )
