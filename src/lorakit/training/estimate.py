"""What a run is expected to take, estimated before its first step and kept, so that it can be held against it."""

from __future__ import annotations

import math
from dataclasses import replace

from lorakit.adapters import Handle
from lorakit.bases import model_kind
from lorakit.errors import InputError
from lorakit.records import Planned
from lorakit.training.config import TrainConfig
from lorakit.training.costs import PARTS, cost_of
from lorakit.training.costs.extend import CHECKED, FEW, MORE, num_like_blocks
from lorakit.training.fitting import setup_of
from lorakit.training.measuring import seconds_per_token
from lorakit.training.observe import About, Observer
from lorakit.training.prepare import Prepared
from lorakit.training.run_folder import RunFolder
from lorakit.training.start import Start

MOST_SIMULATED = 300
"""Layers with an update of which a simulated step takes a few seconds; beyond, the estimate is left out.

A layer takes some 10 ms, however wide it is. Where a model has many blocks that are alike, few are simulated.
"""


LONG = 600.0
"""Seconds of training from which compiling is advised on a CPU."""

COMPILE = "This takes a while: compile (--compile) may spare a tenth of it."


def foreseen(
    prepared: Prepared,
    config: TrainConfig,
    handle: Handle,
    name: str,
    processes: int,
    folder: RunFolder | None,
    start: Start,
    observer: Observer,
) -> Start:
    """Return ``start`` with what the run is expected to take, and tell who watches what is trained on what.

    A run without a folder has no report, and is not estimated; a resumed one is held against its first estimate.
    """
    if folder is not None and start.planned is None:
        observer.stage("estimating what the training takes")
        planned = estimated(prepared, config, handle, name)
        start = replace(start, planned=with_time(planned, prepared, config, handle, name, processes))
        folder.write("start.json", start)
        if _would_pay(start.planned, prepared, config):
            observer.note(COMPILE)
    observer.begins(about(prepared, handle, name, str(folder.path) if folder is not None else None, start.planned))
    return start


def estimated(prepared: Prepared, config: TrainConfig, handle: Handle, name: str) -> Planned:
    """Simulate a step of the longest micro-batch, where that takes seconds at most, and say what it tells.

    The simulation is that of ``lorakit plan``. A model that cannot be simulated is trained all the same; the reason is
    kept.
    """
    recipe = prepared.recipe
    setup = setup_of(config, recipe, prepared.base, prepared.spec, prepared.method)
    blocks = num_like_blocks(setup)
    num_layers = len(handle.parameters(name))
    simulated = num_layers if blocks is None else num_layers * (FEW + MORE + CHECKED) // blocks
    if simulated > 2 * MOST_SIMULATED:
        reason = f"{num_layers // 2:,} layers, not all alike, take long to simulate; `lorakit plan` does"
        return Planned(recipe.num_steps, left_out=reason)
    task = prepared.spec.kind
    longest = sorted(prepared.train, key=lambda row: -task.size(row))[: _micro_batch(prepared, config)]
    try:
        cost = cost_of(setup, longest)
    except (InputError, ValueError) as error:
        return Planned(recipe.num_steps, left_out=str(error))
    return Planned(
        recipe.num_steps,
        cost.num_trainable,
        cost.saved_bytes,
        {part: getattr(cost.memory, part) for part in PARTS},
    )


def with_time(
    planned: Planned, prepared: Prepared, config: TrainConfig, handle: Handle, name: str, processes: int
) -> Planned:
    """Add the seconds of the training without its evaluations: those of a real pass, by tokens, times all steps.

    Processes share the rows of a step. What the compiler gains is not in it.
    """
    recipe, task, rows = prepared.recipe, prepared.spec.kind, prepared.train
    per_epoch = math.ceil(len(rows) / recipe.batch_size)
    tokens = sum(task.size(row) for row in rows) * recipe.num_steps / per_epoch
    micro = _micro_batch(prepared, config)
    per_token = seconds_per_token(prepared, handle, name, micro, config.grad_checkpointing)
    reason = f"by the tokens of one real pass over the longest {wording(micro)}"
    reason += ", not compiled" if config.compile else ""
    return replace(planned, seconds=per_token * tokens / processes, seconds_from=reason)


def _would_pay(planned: Planned | None, prepared: Prepared, config: TrainConfig) -> bool:
    """Tell whether a run is long enough for compiling, which models that write gained by on a CPU, and may have it."""
    long = planned is not None and planned.seconds is not None and planned.seconds > LONG
    model = prepared.base.model
    gains = next(model.parameters()).device.type == "cpu" and model_kind(model.config) != "encoder"
    return long and gains and not (config.compile or config.cache_prefix or config.recompute == "on")


def wording(num_rows: int) -> str:
    """Return a number of rows in words."""
    return "row" if num_rows == 1 else f"{num_rows:,} rows"


def _micro_batch(prepared: Prepared, config: TrainConfig) -> int:
    """Return the rows at a time from the first step on."""
    size = prepared.recipe.micro_batch
    return max(1, size // 2) if config.halve_micro_at == 1 else size


def about(prepared: Prepared, handle: Handle, name: str, folder: str | None, planned: Planned | None) -> About:
    """Return what is trained on what, for those who watch."""
    base, recipe, task = prepared.base, prepared.recipe, prepared.spec.kind
    counts = handle.counts(name)
    parameter = next(base.model.parameters())
    return About(
        task=prepared.spec.task,
        model=base.name,
        num_base=counts.base,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        method=prepared.method.summary(),
        targets=tuple(handle.entry(name).targets),
        num_trainable=counts.trained,
        num_head=counts.full,
        num_rows=len(prepared.train),
        num_held=len(prepared.held),
        num_tokens=sum(task.size(row) for row in prepared.train),
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        num_steps=recipe.num_steps,
        epochs=recipe.num_steps / math.ceil(len(prepared.train) / recipe.batch_size),
        folder=folder,
        planned=planned,
    )
