"""``lorakit train MODEL DATA``: fine-tune a model on a file of examples."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorakit.cli import options, output

if TYPE_CHECKING:
    from lorakit.cli.progress import Watch
    from lorakit.records import RunSummary
    from lorakit.training.config import TrainConfig
    from lorakit.training.session import FitResult

NOT_SETTINGS = ("as_json", "quiet", "config")
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
    quiet: options.Quiet = False,
    config: options.ConfigFile = None,
    task: options.Task = None,
    method: options.MethodName = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    init: options.Init = None,
    budget: options.Budget = None,
    targets: options.Targets = None,
    exclude: options.Exclude = None,
    layers: options.Layers = None,
    train_modules: options.TrainModules = None,
    add_tokens: options.AddTokens = None,
    train_vocabulary: options.TrainVocabulary = None,
    epochs: options.Epochs = None,
    max_steps: options.MaxSteps = None,
    lr: options.LearningRate = None,
    optimizer: options.Optimizer = None,
    schedule: options.Schedule = None,
    warmup: options.Warmup = None,
    weight_decay: options.WeightDecay = None,
    clip_norm: options.ClipNorm = None,
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    eval_every: options.EvalEvery = None,
    patience: options.Patience = None,
    save_every: options.SaveEvery = None,
    keep: options.Keep = None,
    log_to: options.LogTo = None,
    seed: options.Seed = None,
    validation: options.Validation = None,
    columns: options.Columns = None,
    max_length: options.MaxLength = None,
    dtype: options.TrainDtype = None,
    device: options.TrainDevice = None,
    packing: options.Packing = None,
    cache_prefix: options.CachePrefix = None,
    grad_checkpointing: options.GradCheckpointing = None,
    recompute: options.Recompute = None,
    compile_: options.Compile = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrainTrust = None,
) -> None:
    """Fine-tune MODEL on the rows of DATA; whatever no flag says is chosen, and printed with its reason.

    The columns tell the task: text + label is classification; prompt + completion is generation.

    So are messages, or instruction + output; text alone is language modeling.
    """
    from lorakit.training.fit import fit

    base, rows, settings = read_settings(config, flags(ctx.params))
    watched(lambda watch: fit(base, rows, config=settings, observer=watch), str(settings.output), as_json, quiet)


def watched(run: Callable[[Watch], FitResult], output_: str, as_json: bool, quiet: bool = False) -> None:
    """Run a training, or the rest of one, and print what it found; an interrupted one says how to go on."""
    from lorakit.cli.machine import JsonWatch
    from lorakit.cli.progress import Watch
    from lorakit.records import to_json
    from lorakit.reports.comparison import in_one_line
    from lorakit.reports.html import write_report
    from lorakit.training.processes import started

    main = started().main
    watch = JsonWatch() if as_json and not quiet else Watch(show_choices=not as_json, quiet=quiet)
    try:
        with watch if main else contextlib.nullcontext():
            result = run(watch)
            if not main:
                return
            watch.stage("writing the report")
            assert result.folder is not None
            report = write_report(result.folder)
    except KeyboardInterrupt:
        if not main or (watch.checkpoint is None and not watch.adapter_saved):
            raise
        whole = "its measures are not" if watch.adapter_saved else f"step {watch.checkpoint:,} is the last one saved"
        output.say(f"interrupted: the adapter is saved whole in '{output_}'; {whole}.")
        say_how_to_go_on(output_)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        output.show_json({**to_json(result.summary), "run": str(result.folder), "report": str(report)})
    elif quiet:
        output.say(in_one_line(result.summary), prefix="")
        print(result.folder)
    else:
        show(result.summary, result.folder, report)
    if not result.summary.finished:
        output.say(f"interrupted: the adapter so far is saved whole in '{result.folder}'.")
        say_how_to_go_on(str(result.folder))
        raise typer.Exit(INTERRUPTED)


def say_how_to_go_on(folder: str) -> None:
    """Say the command that goes on with a run."""
    output.say(f"go on with: lorakit resume {shlex.quote(folder)}", prefix="")


def flags(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as flags, by their names in :class:`TrainConfig`."""
    from lorakit.training.data.columns import parse_columns

    values = {
        name.rstrip("_"): value for name, value in given.items() if value is not None and name not in NOT_SETTINGS
    }
    for name in LISTS:
        if name in values:
            values[name] = options.split_names(values[name])
    if str(values.get("rank", "")).isdecimal():
        values["rank"] = int(values["rank"])
    if "columns" in values:
        values["columns"] = parse_columns(values["columns"])
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
    from lorakit.training.config import RunConfig, TrainConfig, read_config

    class TrainFile(RunConfig):
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
    settings = TrainConfig(**{**checked.model_dump(exclude={"model", "data"}, exclude_unset=True), "output": chosen})
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
    from lorakit.reports.html import read_run
    from lorakit.reports.tables import samples_table, summary_table

    output.show(
        summary_table(summary, read_run(folder)[1]), *([samples_table(summary.samples)] if summary.samples else [])
    )
    run = shlex.quote(str(folder))
    use = f"lorakit predict {run} --text '...'" if summary.labels else f"lorakit generate {run} '...'"
    merged = shlex.quote(f"{folder}-merged")
    print(f"Run folder  {folder}\nReport      {report}\n\nNext")
    for command in (use, f"lorakit eval {run} test.jsonl", f"lorakit merge {run} {merged}", f"lorakit inspect {run}"):
        print(f"  {command}")
