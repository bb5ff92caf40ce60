"""``lorakit predict RUN FILE``: label texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lorakit.training.runs import Prediction

SHOWN_TEXT = 200


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Label texts with a run.",
        epilog='Example: lorakit predict runs/first --text "Where is my parcel?" --json',
    )(predict)


def predict(
    run: options.RunFolder,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE", help="Texts, with or without labels; - reads lines from stdin.", show_default=False
        ),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text to label; may be said several times.")] = None,
    base: options.BaseModel = None,
    labels: options.Labels = None,
    device: options.Device = "auto",
    dtype: options.BaseDtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Label the texts of FILE with a classifier; --json prints one JSON object a line."""
    from lorakit.cli.progress import Watch
    from lorakit.reports import wording
    from lorakit.training.data.texts import Texts, read_texts, texts_of_lines
    from lorakit.training.runs import open_run

    if (file is None) == (not text):
        raise ConfigError("give the texts either as FILE ('-' for lines on stdin) or with --text.")
    with Watch() as watch:
        watch.stage("loading the run")
        opened = open_run(
            run,
            base,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            labels=options.split_names(labels),
        )
        if file is None or file == "-":
            texts: Texts = texts_of_lines(text or (), "--text") if file is None else texts_of_lines(sys.stdin)
        else:
            texts = read_texts(file, pairs=opened.spec.layout == "pair-label")
        watch.stage(f"labelling {wording.plural(len(texts), 'text')}")
        found = opened.predict(texts)
        cut = opened.too_long(texts)
    if as_json:
        for prediction in found:
            output.show_json_line({"text": prediction.text} | said(prediction))
    else:
        output.show(table(found))
    if cut:
        shown = ", ".join(str(number) for number in cut[:8]) + (" ..." if len(cut) > 8 else "")
        output.note(f"{len(cut):,} of {len(texts):,} texts were cut to {opened.spec.max_length:,} tokens: {shown}")


def said(prediction: Prediction) -> dict[str, object]:
    """Return a label and every class's probability, the most likely first."""
    shares = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    return {"label": prediction.label, "probabilities": dict(shares)}


def table(found: Sequence[Prediction]) -> RenderableType:
    """Lay out predictions: the label, its probability, the runner-up and the text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from lorakit.reports import wording

    laid = Table(box=box.SIMPLE_HEAD, header_style="bold")
    laid.add_column("label", overflow="fold")
    laid.add_column("probability", justify="right", no_wrap=True)
    laid.add_column("next", style="dim", overflow="fold")
    laid.add_column("text", overflow="fold", ratio=1)
    for prediction in found:
        shares = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
        runner_up = f"{shares[1][0]} ({shares[1][1]:.2f})" if len(shares) > 1 else ""
        text = wording.shortened(wording.printable(prediction.text), SHOWN_TEXT)
        share = f"{prediction.probabilities[prediction.label]:.2f}"
        laid.add_row(Text(prediction.label, style="bold"), share, Text(runner_up), Text(text))
    return laid
