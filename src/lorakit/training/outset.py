"""Before the first step: the adapter on the model, the base measured, and whether a step fits into memory."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.adapters import Handle, attach
from lorakit.bases import Base
from lorakit.errors import TrainingError
from lorakit.inits import Calibration
from lorakit.methods.lora import LoRA
from lorakit.training.config import TrainConfig
from lorakit.training.data.encode import EncodedRow
from lorakit.training.diagnosis import broken_base
from lorakit.training.measuring import step_memory
from lorakit.training.observe import Observer
from lorakit.training.packing import tried
from lorakit.training.prepare import Prepared
from lorakit.training.recipe import say_ranks
from lorakit.training.start import Start
from lorakit.training.stepper import is_out_of_memory, out_of_memory

CALIBRATION_ROWS = 512


def attached(prepared: Prepared, config: TrainConfig, name: str) -> Handle:
    """Attach the adapter that the settings describe; a new head is trained in full beside it."""
    base = prepared.base
    heads = list(base.new_modules) or (["head"] if prepared.spec.labels else [])
    handle = attach(
        base.model,
        prepared.method,
        name=name,
        new_modules=base.new_modules,
        calibration=calibration_of(prepared, config) if prepared.method.looks() is not None else None,
        **config.attaching([*heads, *base.in_full]),
    )
    if isinstance(prepared.method, LoRA) and prepared.method.rank == "auto":
        say_ranks(prepared.recipe, prepared.method, handle.entry(name).method, handle.updates(name))
    return handle


def tried_packing(prepared: Prepared, handle: Handle, name: str) -> str:
    """Return 'on' or 'off': whether examples are packed. Where they see one another in this model, they are not."""
    recipe, padded = prepared.recipe, prepared.spec.collator(prepared.base.tokenizer)
    if not recipe.packing:
        return "off"
    parameters = list(handle.parameters(name).values())
    trial = tried(prepared.base.model, prepared.spec.kind, padded, prepared.train, parameters)
    if trial.holds:
        return "on"
    recipe.packing = False
    recipe.choices = [choice for choice in recipe.choices if choice.name != "packing"]
    recipe.say("packing", "off", f"in {trial.model} examples of one sequence see one another")
    prepared.notes.append(str(trial))
    return "off"


def calibration_of(prepared: Prepared, config: TrainConfig) -> Calibration:
    """Return training rows, drawn by the seed, on which a method looks at the model; padding does not count.

    An encoder-decoder, whose two sides are padded apart, sees row by row, without any padding; where memory is too
    short to keep activations, any model sees row by row. The weight of a batch is the number of its terms in the loss.
    """
    task, model = prepared.spec.kind, prepared.base.model
    collate, device = prepared.spec.collator(prepared.base.tokenizer), next(model.parameters()).device
    count = min(CALIBRATION_ROWS, len(prepared.train))
    drawn = random.Random(config.seed).sample(range(len(prepared.train)), count)
    size = 1 if config.grad_checkpointing else prepared.recipe.micro_batch
    if prepared.spec.encoder_decoder:
        collate, size = dataclasses.replace(collate, pad_to=1), 1
    parts = [[prepared.train[i] for i in drawn[start : start + size]] for start in range(0, count, size)]
    batches = [{key: value.to(device) for key, value in collate(part).items()} for part in parts]
    units = {id(batch): float(sum(task.units(row) for row in part)) for batch, part in zip(batches, parts, strict=True)}
    return Calibration(
        batches,
        loss=lambda model, batch: task.loss(model, dict(batch)) / max(1.0, units[id(batch)]),
        weight=lambda batch: units[id(batch)],
    )


def measured(prepared: Prepared, start: Start, asked: Sequence[EncodedRow], observer: Observer) -> Start:
    """Return ``start`` with what the untouched base does on the held-out rows, and what must be beaten.

    Raises:
        TrainingError: the base gives no number for some rows, which are named.
    """
    model, tokenizer, held = prepared.base.model, prepared.base.tokenizer, prepared.held
    task, collate = prepared.spec.kind, prepared.spec.collator(tokenizer)
    observer.stage("measuring the base")
    before = task.evaluate(model, held, collate)
    if not math.isfinite(before.loss):
        each = ((row, task.evaluate(model, [row], collate).loss) for row in held)
        broken = [row.number for row, loss in each if not math.isfinite(loss)]
        raise TrainingError(broken_base(before.loss, broken).text)
    if prepared.spec.labels:
        observer.stage("fitting a linear probe on the frozen base")
    others: dict[str, Any] = dict(task.baselines(model, prepared.train, held, collate))
    answers = tuple(task.answer(model, tokenizer, asked))
    return dataclasses.replace(start, before=before, answers=answers, **others)


def memory_or_half(
    prepared: Prepared, handle: Handle, name: str, config: TrainConfig, several: bool
) -> tuple[int, bool]:
    """Measure a step on the longest micro-batch; where it does not fit, measure half of it and note that.

    Returns:
        Tensor bytes at the step's peak, and whether that is with half the micro-batch, which was not yet planned.

    Raises:
        TrainingError: half of it does not fit either, or is not to be tried.
    """
    size, planned = prepared.recipe.micro_batch, config.halve_micro_at == 1
    if planned:
        size = max(1, size // 2)
    try:
        return step_memory(prepared, handle, name, size, config.grad_checkpointing), False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if size == 1 or planned or several:
        raise TrainingError(out_of_memory(f"on the longest rows, {size:,} at a time"))
    half = config.replaced(halve_micro_at=1)
    memory, _ = memory_or_half(prepared, handle, name, half, several)
    prepared.notes.append(
        f"Memory does not hold {size:,} of the longest rows at a time: micro_batch is {size // 2:,} from the first "
        "step on."
    )
    return memory, True


def place_of(base: Base) -> str:
    """Return the base's name; a folder's from the root, since a run folder is used from anywhere."""
    folder = Path(base.name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else base.name
