"""``lorakit plan MODEL DATA``: what a training will take, before it is begun."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli import options, output
from lorakit.cli.train import flags

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.training.costs.plan import CostPlan

PlanModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a config.json, or a hub name.", show_default=False)
]
PlanData = Annotated[
    str | None, typer.Argument(metavar="DATA", help="Rows, as `lorakit train` takes them.", show_default=False)
]
NumRows = Annotated[int, typer.Option("--rows", min=1, help="Without DATA: rows to train on.")]
Length = Annotated[int | None, typer.Option(min=2, help="Without DATA: tokens in each row.")]
Cards = Annotated[
    list[str] | None,
    typer.Option(metavar="SIZE", help="A card's memory, such as 80GB (repeatable); the micro-batch is for the first."),
]
NoProbe = Annotated[bool, typer.Option("--no-probe", help="Take no real step.")]

NOT_SETTINGS = {"model", "data", "rows", "length", "memory", "no_probe", "as_json"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Say what a training will take: memory, time, disk.",
        epilog="Example: lorakit plan MODEL rows.jsonl --memory 24GB",
    )(plan)


def plan(
    ctx: typer.Context,
    model: PlanModel,
    data: PlanData = None,
    rows: NumRows = 1000,
    length: Length = None,
    memory: Cards = None,
    no_probe: NoProbe = False,
    as_json: options.AsJson = False,
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
    batch_size: options.BatchSize = None,
    micro_batch: options.MicroBatch = None,
    optimizer: options.Optimizer = None,
    seed: options.Seed = None,
    validation: options.Validation = None,
    max_length: options.MaxLength = None,
    dtype: options.TrainDtype = None,
    device: options.TrainDevice = None,
    packing: options.Packing = None,
    cache_prefix: options.CachePrefix = None,
    grad_checkpointing: options.GradCheckpointing = None,
    recompute: options.Recompute = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrainTrust = None,
) -> None:
    """Simulate a step of full fine-tuning, of the head alone, of the method and of a 4-bit base, side by side.

    Then take the method's step for real on the longest batch.

    A config alone will do: without the weights, no real step is taken.
    """
    from lorakit.records import to_json
    from lorakit.training.config import TrainConfig
    from lorakit.training.costs import read_size
    from lorakit.training.costs.plan import plan_costs

    given = {name: value for name, value in ctx.params.items() if name not in NOT_SETTINGS}
    settings = flags(given)
    wanted, cards = TrainConfig(**settings), [read_size(size) for size in memory or ()]
    found = plan_costs(model, data, wanted, num_rows=rows, length=length, cards=cards, probing=not no_probe)
    if as_json:
        output.show_json(to_json(found))
        return
    show(found)
    if data is not None:
        command = ["lorakit", "train", model, data, *_as_flags(settings, found)]
        print(f"\nNext\n  {shlex.join(command)}")


def show(found: CostPlan) -> None:
    """Print a plan."""
    from rich.text import Text

    output.show(Text(f"{found.model}: {found.num_parameters:,} parameters, {found.dtype} on {found.device}\n"))
    output.show(_facts(found), _columns(found))
    if found.measured is not None:
        output.show(Text(measured_line(found), overflow="fold"))
    for line in fits_lines(found):
        output.show(Text(line, overflow="fold"))
    for note in found.notes:
        output.show(Text.assemble(("! ", "bold yellow"), note, overflow="fold"))


def measured_line(found: CostPlan) -> str:
    """Return the estimate beside the measured figure."""
    from lorakit.reports import wording

    measured = found.measured
    assert measured is not None
    return (
        f"Probe  a step on the longest batch, above the loaded base: estimated "
        f"{wording.size(measured.estimated_bytes)}, measured {wording.size(measured.measured_bytes)} "
        f"({100 * measured.error:+.1f} %)"
    )


def fits_lines(found: CostPlan) -> list[str]:
    """Return one line for each size of card."""
    lines = []
    for card in dict.fromkeys(entry.card_bytes for entry in found.fits):
        words = []
        for entry in found.fits:
            if entry.card_bytes == card:
                number = entry.num_cards
                words.append(f"{entry.column}: {'none' if number is None else number}")
        lines.append(f"Cards of {card / 1e9:g} GB  " + "; ".join(words))
    return lines


def _facts(found: CostPlan) -> Table:
    from rich import box
    from rich.table import Table

    from lorakit.reports import wording

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    times = f", {found.accumulation} times" if found.accumulation > 1 else ""
    room = f" (for {wording.size(found.free_bytes)})" if found.free_bytes is not None else ""
    table.add_row("Rows", f"{found.found}; the longest has {found.longest:,} tokens")
    table.add_row("Batch", f"{found.batch_size:,} rows; {found.micro_batch:,} at a time in memory{times}{room}")
    table.add_row("Steps", f"{found.num_steps:,} in {found.epochs:g} epochs of {found.tokens:,} tokens")
    if found.seconds is not None:
        table.add_row("Time", f"{wording.duration(found.seconds)}, {found.seconds_reason}")
    return table


def _columns(found: CostPlan) -> Table:
    from rich import box
    from rich.table import Table

    from lorakit.reports import wording
    from lorakit.training.costs import PARTS

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("at the peak")
    for column in found.columns:
        table.add_column(column.name.replace(", ", "\n"), justify="right", no_wrap=True)
    for part in PARTS:
        table.add_row(part, *(wording.size(getattr(c.memory, part)) if c.memory else "" for c in found.columns))
    table.add_section()
    table.add_row("all", *(wording.size(c.memory.total) if c.memory else "not here" for c in found.columns))
    table.add_row("trained", *(_short(c.num_trainable) if c.memory else "" for c in found.columns))
    table.add_row("result", *(wording.size(c.adapter_bytes) if c.memory else "" for c in found.columns))
    table.add_row("checkpoint", *(wording.size(c.checkpoint_bytes) if c.memory else "" for c in found.columns))
    return table


def _short(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"


def _as_flags(settings: dict[str, Any], found: CostPlan) -> list[str]:
    """Return the settings as flags of ``lorakit train``, with what was chosen for the memory."""
    values = dict(settings)
    if any(choice.name == "recompute" and choice.value == "on" for choice in found.choices):
        values["recompute"] = "on"
    if found.accumulation > 1:
        values["micro_batch"] = found.micro_batch
    words: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    return words
