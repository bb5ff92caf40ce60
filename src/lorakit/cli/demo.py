"""``lorakit demo``: see it work, on data and a model that ship with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output

if TYPE_CHECKING:
    from lorakit.demos.digits import DigitsResult
    from lorakit.demos.text import DemoResult

DEMOS = {
    "text": "the real MiniLM learns to sort 600 customer messages in 8 intents (about a minute)",
    "digits": "6,794 numbers mend a network's worst digit, and what it forgets by it (seconds)",
}
INTERRUPTED = 130

app = typer.Typer(help="See it work on packaged data.", epilog="Example: lorakit demo text", rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def demos(ctx: typer.Context, as_json: options.AsJson = False) -> None:
    """See it work on packaged data; without a name, list the demos."""
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        output.show_json([{"name": name, "about": about} for name, about in DEMOS.items()])
        return
    for name, about in DEMOS.items():
        print(f"lorakit demo {name:<8}{about}")


@app.command(epilog="Example: lorakit demo text --output my-demo")
def text(
    output_: Annotated[
        str, typer.Option("--output", "-o", metavar="RUN", help="Run folder; an earlier run there is replaced.")
    ] = "lorakit-demo/text",
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune the packaged MiniLM on 600 customer messages (written by a language model for this demo).

    120 of the messages are a test that the training never sees; all results are measured on them.
    """
    from lorakit.cli.progress import Watch
    from lorakit.demos.text import run
    from lorakit.records import to_json

    with Watch(show_choices=not as_json) as watch:
        result = run(output_, seed, watch)
    if as_json:
        output.show_json(
            {**to_json(result.summary), "run": str(result.folder), "report": str(result.report)}
            | {"picture": str(result.picture)}
        )
    else:
        show(result)
    if not result.summary.finished:
        output.say(f"interrupted: the adapter so far is saved whole in '{result.folder}'.")
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Example: lorakit demo digits --seed 1")
def digits(
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FOLDER", help="MNIST's idx files, gzipped or not; else scikit-learn's digits."),
    ] = None,
    output_: Annotated[
        str, typer.Option("--output", "-o", metavar="RUN", help="Folder; an earlier run there is replaced.")
    ] = "lorakit-demo/digits",
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the network and the batches.")] = 0,
    digit: Annotated[
        int | None, typer.Option(min=0, max=9, help="Train the adapters on this digit; else on the worst.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Mend the worst digit of a network with a LoRA of rank 1, and count what it forgets by it.

    A network of 2.8 million numbers learns handwritten digits in one epoch. One adapter is trained on its worst
    digit alone, one with replay of the others. All results are measured on images that no training has seen.
    """
    from lorakit.cli.progress import Watch
    from lorakit.demos.digits import run
    from lorakit.records import to_json

    with Watch(show_choices=not as_json) as watch:
        result = run(output_, data, seed, digit, watch)
    if as_json:
        output.show_json(
            {**to_json(result.summary), "run": str(result.folder), "report": str(result.report)}
            | {"picture": str(result.picture)}
        )
    else:
        show_digits(result)


def show(result: DemoResult) -> None:
    """Print what came out, and what to try next."""
    from lorakit.reports.tables import samples_table, summary_table

    output.show(summary_table(result.summary), samples_table(result.summary.samples))
    print(f"Run folder  {result.folder}\nReport      {result.report}\nPicture     {result.picture}\n\nNext")
    print(f'  lorakit predict {result.folder} --text "The parcel came, but the box was empty."')
    print(f"  lorakit merge {result.folder} {result.folder}-merged\n  lorakit inspect {result.folder}")


def show_digits(result: DigitsResult) -> None:
    """Print what came out, and what to try next."""
    from lorakit.reports import digits_words
    from lorakit.reports.digits_tables import digits_tables

    output.show(digits_tables(result.summary))
    print(f"Run folder  {result.folder}\nReport      {result.report}\nPicture     {result.picture}\n\nNext")
    for command in digits_words.commands(str(result.folder), result.summary):
        print(f"  {command}")
    print("or, in Python")
    for line in digits_words.snippet(str(result.folder), result.summary).splitlines():
        print(f"  {line}".rstrip())
