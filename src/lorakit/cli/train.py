"""``lorakit train MODEL DATA``: fine-tune a model on a file of examples."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorakit.cli import options, output

if TYPE_CHECKING:
    from lorakit.records import RunSummary
    from lorakit.training.config import TrainConfig

NOT_SETTINGS = ("as_json", "config")
LISTS = ("train_modules",)
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: lorakit train ./my-model rows.jsonl --epochs 3 --output runs/first",
        short_help="Fine-tune a model on a file of examples.",
    )(train)


def train(
    ctx: typer.Context,
    model: options.TrainModel = None,
    data: options.TrainData = None,
    output_: options.TrainOutput = None,
    force: options.TrainForce = None,
    as_json: options.TrainJson = False,
    config: options.ConfigFile = None,
    task: options.Task = None,
    method: options.MethodName = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    targets: options.Targets = None,
    exclude: options.Exclude = None,
    layers: options.Layers = None,
    train_modules: options.TrainModules = None,
    epochs: options.Epochs = None,
    max_steps: options.MaxSteps = None,
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    seed: options.Seed = None,
    validation: options.Validation = None,
    max_length: options.MaxLength = None,
    dtype: options.TrainDtype = None,
    device: options.TrainDevice = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrainTrust = None,
) -> None:
    """Fine-tune MODEL on the rows of DATA; whatever no flag says is chosen, and printed with its reason.

    The columns tell the task: text + label is classification; prompt + completion is generation.

    So are messages, or instruction + output; text alone is language modeling.
    """
    from lorakit.cli.progress import Watch
    from lorakit.records import to_json
    from lorakit.reports.html import write_report
    from lorakit.training.fit import fit

    base, rows, settings = read_settings(config, flags(ctx.params))
    watch = Watch(show_choices=not as_json)
    try:
        with watch:
            result = fit(base, rows, config=settings, observer=watch)
            watch.stage("writing the report")
            assert result.folder is not None
            report = write_report(result.folder)
    except KeyboardInterrupt:
        if not watch.saved:
            raise
        output.say(f"interrupted: the adapter is saved whole in '{settings.output}'; its measures are not.")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        output.show_json({**to_json(result.summary), "run": str(result.folder), "report": str(report)})
    else:
        show(result.summary, result.folder, report)
    if not result.summary.finished:
        output.say(f"interrupted: the adapter so far is saved whole in '{result.folder}'.")
        raise typer.Exit(INTERRUPTED)


def flags(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as flags, by their names in :class:`TrainConfig`."""
    values = {
        name.rstrip("_"): value for name, value in given.items() if value is not None and name not in NOT_SETTINGS
    }
    for name in LISTS:
        if name in values:
            values[name] = options.split_names(values[name])
    if "validation" in values:
        values["validation"] = share_or_file(values["validation"])
    return values


def share_or_file(text: str) -> float | str:
    """Read a number as a share of the rows, anything else as a file."""
    try:
        return float(text)
    except ValueError:
        return text


def read_settings(file: str | None, given: dict[str, Any]) -> tuple[str, str, TrainConfig]:
    """Merge the config file and the flags (which win) into model, data and settings.

    Raises:
        ConfigError: unknown keys, wrong values, no model or no data; all of them at once.
    """
    from lorakit.errors import ConfigError
    from lorakit.training.config import TrainConfig, read_config

    class TrainFile(TrainConfig):
        """What a config file may say: the settings, the model and the data."""

        model: str
        data: str

    values = {**(read_config(file) if file else {}), **given}
    missing = [name for name in ("model", "data") if values.get(name) is None]
    try:
        checked = TrainFile(**values)
    except ConfigError as error:
        where = f"config file '{file}' and flags: " if file else ""
        hint = " Give MODEL and DATA, or say them in the file of --config." if missing else ""
        raise ConfigError(f"{where}{str(error).removeprefix('TrainFile: ')}{hint}") from None
    chosen: str = checked.output or default_output(checked.model, checked.data)
    settings = TrainConfig(**{**checked.model_dump(exclude={"model", "data"}), "output": chosen})
    return checked.model, checked.data, settings


def default_output(model: str, data: str) -> str:
    """Return ``runs/<model>-<data>``, or the first free one of ``-2``, ``-3``, ..."""
    words = [Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else Path(model).name]
    words.append(Path(data).expanduser().resolve().stem)
    stem = "-".join("".join(c if c.isalnum() or c in "._-" else "-" for c in word) for word in words)
    place, number = Path("runs", stem), 1
    while place.exists() or place.is_symlink():
        number += 1
        place = Path("runs", f"{stem}-{number}")
    return str(place)


def show(summary: RunSummary, folder: Path, report: Path) -> None:
    """Print what a run found, where everything is, and what to do next."""
    from lorakit.reports.tables import samples_table, summary_table

    output.show(summary_table(summary), *([samples_table(summary.samples)] if summary.samples else []))
    run = shlex.quote(str(folder))
    use = f"lorakit predict {run} --text '...'" if summary.labels else f"lorakit generate {run} '...'"
    merged = shlex.quote(f"{folder}-merged")
    print(f"Run folder  {folder}\nReport      {report}\n\nNext")
    for command in (use, f"lorakit eval {run} test.jsonl", f"lorakit merge {run} {merged}", f"lorakit inspect {run}"):
        print(f"  {command}")
