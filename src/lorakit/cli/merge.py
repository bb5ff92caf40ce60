"""``lorakit merge RUN OUT``: make a plain model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output

if TYPE_CHECKING:
    from lorakit.training.deliver import MergeReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(short_help="Make a plain model folder of a run.", epilog="Example: lorakit merge runs/first my-model")(
        merge
    )


def merge(
    run: options.RunFolder,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The model folder to write.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="What to store: fp32, bf16, fp16; 'auto' is the checkpoint's own.")
    ] = "auto",
    force: options.Force = False,
    base: options.BaseModel = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Merge the adapter into its base and write a plain model folder that transformers loads.

    Refuses where merging changes the fp32 outputs beyond a tolerance; says what rounding to the stored dtype does.
    """
    from lorakit.cli.progress import Watch
    from lorakit.records import to_json
    from lorakit.training.deliver import merge_run

    with Watch() as watch:
        watch.stage("merging")
        report = merge_run(run, out, base, dtype=dtype, force=force, trust_remote_code=trust_remote_code)
    if as_json:
        output.show_json(to_json(report))
        return
    for line in in_words(report):
        print(line)


def in_words(report: MergeReport) -> list[str]:
    """Say what a merge did."""
    lines = [
        f"Merged into {report.num_merged:,} tensors; outputs differ from the adapted model's by at most "
        f"{report.max_difference:.1e} in fp32 (tolerance {report.tolerance:.1e}).",
        f"Stored as {report.dtype}: rounding moves the outputs by {report.rounding_kl:.1e} nats (KL), and "
        f"{100 * report.rounding_top1:.1f} % of them keep their top choice.",
    ]
    if report.untied:
        lines.append(f"No longer tied to another tensor: {', '.join(report.untied)}.")
    same = "gives the same outputs." if report.reloaded else "does NOT give the same outputs: do not use it."
    lines.append(f"Loaded again, the folder {same}")
    lines.append(f"Model folder  {report.output}")
    return lines
