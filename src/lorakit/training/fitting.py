"""The micro-batch that memory holds: chosen before the first step, by a simulation where it could be close."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.bases import Base
from lorakit.errors import ModelError
from lorakit.methods import Method
from lorakit.training.config import TrainConfig
from lorakit.training.costs import Setup, fitting_micro_batch, surely_fits
from lorakit.training.data.encode import EncodedRow
from lorakit.training.memory import free_bytes
from lorakit.training.recipe import Recipe, plan_of
from lorakit.training.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_ROWS = 256


def fit_memory(
    config: TrainConfig, recipe: Recipe, base: Base, spec: TaskSpec, method: Method, rows: Sequence[EncodedRow]
) -> None:
    """Choose what is kept for the backward pass, and the rows at a time, for the memory that is free."""
    free = free_bytes(next(base.model.parameters()).device)
    longest = sorted(rows, key=lambda row: -row.length)[:MOST_ROWS]
    count = sum(p.numel() for p in base.model.parameters())
    choose_recompute(config, recipe, base.model.config, count, longest[0].length if longest else 0, free)
    if config.micro_batch is None and free is not None and longest:
        _fit_micro_batch(recipe, base, setup_of(config, recipe, base, spec, method), longest, count, free)


def _fit_micro_batch(
    recipe: Recipe, base: Base, setup: Setup, longest: Sequence[EncodedRow], count: int, free: int
) -> None:
    """Lower ``recipe.micro_batch`` to what the memory holds of the longest rows, and say so.

    Nothing is done where the memory is plainly ample. A model that cannot be simulated keeps the recipe's choice; the
    step that is measured before the training halves it if need be.
    """
    if surely_fits(base.model.config, count, recipe.batch_size, longest[0].length, free):
        if recipe.micro_batch != recipe.batch_size:
            recipe.micro_batch = recipe.batch_size
            recipe.say("micro_batch", recipe.micro_batch, f"{free / 2**30:.1f} GiB are free: far more than needed")
        return
    own = sum(p.numel() * p.element_size() for p in base.model.parameters())
    try:
        micro, parts = fitting_micro_batch(setup, longest, recipe.batch_size, free + own)
    except ModelError as error:
        recipe.say("micro_batch", recipe.micro_batch, f"not simulated ({error}); halved if a step does not fit")
        return
    recipe.micro_batch = micro
    reason = f"the longest {micro:,} rows fit into {free / 2**30:.1f} GiB"
    recipe.say("micro_batch", micro, f"{reason}; {parts} make a batch" if parts > 1 else reason)


def choose_recompute(
    config: TrainConfig,
    recipe: Recipe,
    model_config: PretrainedConfig,
    num_parameters: int,
    longest: int,
    free: int | None,
) -> None:
    """Decide whether what cheap operations made is kept for the backward pass or made again.

    It changes no number. To keep it is faster on a CPU by some hundredths, so that is done wherever memory is ample.

    Args:
        config: as asked.
        recipe: what is decided so far; is told.
        model_config: the base's.
        num_parameters: of the base.
        longest: tokens in the longest row.
        free: bytes of memory; None where the system does not say.
    """
    if config.recompute != "auto":
        recipe.recompute = config.recompute == "on"
        recipe.say("recompute", config.recompute, "as asked")
        return
    if config.compile or free is None:
        return
    rows = recipe.batch_size if config.micro_batch is None else recipe.micro_batch
    recipe.recompute = not surely_fits(model_config, num_parameters, rows, longest, free)
    if recipe.recompute:
        recipe.say("recompute", "on", f"of {free / 2**30:.1f} GiB free a step could take more than a quarter")


def setup_of(config: TrainConfig, recipe: Recipe, base: Base, spec: TaskSpec, method: Method) -> Setup:
    """Return what to simulate for a run whose base is loaded."""
    pad = base.tokenizer.pad_token_id
    return Setup(
        base.model.config,
        next(base.model.parameters()).dtype,
        spec,
        method,
        config.attaching([*(base.new_modules or (["head"] if spec.labels else [])), *base.in_full]),
        dataclasses.replace(plan_of(config, recipe), compile=False),
        pad if isinstance(pad, int) else 0,
        config.trust_remote_code,
    )
