"""``lorakit eval RUN DATA``: measure a run on rows with answers."""

from __future__ import annotations

import typer

from lorakit.cli import options, output


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "eval",
        epilog="Example: lorakit eval runs/first test.jsonl --json",
        short_help="Measure a run on rows with answers.",
    )(evaluate)


def evaluate(
    run: options.RunFolder,
    data: options.AnsweredRows,
    base: options.BaseModel = None,
    labels: options.Labels = None,
    device: options.Device = "auto",
    dtype: options.BaseDtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure RUN on rows with answers: accuracy and F1 per class, or loss and perplexity."""
    from lorakit.cli.progress import Watch
    from lorakit.records import to_json
    from lorakit.reports import wording
    from lorakit.reports.tables import evaluation_table
    from lorakit.training.data.read import read_table
    from lorakit.training.runs import open_run

    with Watch() as watch:
        watch.stage("reading the data")
        table = read_table(data)
        watch.stage("loading the run")
        opened = open_run(
            run,
            base,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            labels=options.split_names(labels),
        )
        watch.stage(f"measuring {wording.plural(len(table.rows), 'row')}")
        found, notes = opened.evaluate(table)
    if as_json:
        output.show_json(
            {"run": run, "data": data, "task": opened.spec.task, "labels": opened.spec.labels}
            | to_json(found)
            | {"notes": list(notes)}
        )
        return
    output.show(evaluation_table(found, opened.spec.labels))
    for text in notes:
        output.note(text)
