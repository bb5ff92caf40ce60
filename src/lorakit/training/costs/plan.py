"""``plan_costs``: what a training takes before it is begun: numbers, steps, time, disk and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.bases import DTYPES, load_base
from lorakit.records import Choice
from lorakit.training import recipe as recipes
from lorakit.training.config import TrainConfig
from lorakit.training.costs.columns import Base, Column, base_of, columns_of, skeleton
from lorakit.training.costs.fit_memory import fits, num_cards
from lorakit.training.costs.micro_batch import fitting_micro_batch
from lorakit.training.costs.probe import probe
from lorakit.training.costs.simulate import Setup
from lorakit.training.costs.subject import Named, Subject, named, subject
from lorakit.training.data.encode import EncodedRow
from lorakit.training.fitting import choose_recompute
from lorakit.training.memory import free_bytes, machine_bytes
from lorakit.training.plan import Plan
from lorakit.training.prepare import Rows
from lorakit.training.recipe import Recipe, plan_of
from lorakit.training.vocabulary import extended, said, trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_SHARE = 1 / 3
"""A forward pass of a step of forward and backward: with a frozen base two products of each, and one forward."""


@dataclass(frozen=True)
class Fits:
    """Whether one kind of training fits on cards of some size, and on how many: None where on no number."""

    card_bytes: int
    column: str
    num_cards: int | None


@dataclass(frozen=True)
class Measured:
    """The estimate beside the real step's figure, in tensor bytes above the loaded base."""

    estimated_bytes: int
    measured_bytes: int
    step_seconds: float

    @property
    def error(self) -> float:
        """The estimate's relative error."""
        return self.estimated_bytes / self.measured_bytes - 1


@dataclass(frozen=True)
class CostPlan:
    """What a training will take.

    Attributes:
        model, found: the model as asked for, and the rows in words.
        num_parameters: of the base; ``dtype`` its weights'.
        batch_size, micro_batch, accumulation: rows of a step, at a time in memory, and how many times.
        longest: tokens in the longest row.
        tokens: input tokens of an epoch.
        epochs, num_steps: of the run.
        seconds: of the run, validation included; None where this machine cannot tell.
        seconds_reason: where that is from.
        free_bytes: memory that the micro-batch was chosen for; None if it was not.
        columns: kinds of training side by side; the third is the method asked for.
        fits: for each size of card asked for and each kind.
        measured: the probe; None if there was none.
        choices: the recipe's, with their reasons.
        notes: what the reader should know.
    """

    model: str
    found: str
    num_parameters: int
    dtype: str
    device: str
    batch_size: int
    micro_batch: int
    accumulation: int
    longest: int
    tokens: int
    epochs: float
    num_steps: int
    seconds: float | None
    seconds_reason: str
    free_bytes: int | None
    columns: tuple[Column, ...]
    fits: tuple[Fits, ...]
    measured: Measured | None
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]

    @property
    def asked(self) -> Column:
        """The method asked for."""
        return self.columns[2]


def plan_costs(
    model: str | Path,
    rows: Rows | None,
    config: TrainConfig,
    *,
    num_rows: int = 1000,
    length: int | None = None,
    cards: Sequence[int] = (),
    probing: bool = True,
) -> CostPlan:
    """Say what training ``model`` on ``rows`` takes, by simulating a step, and take one for real.

    Args:
        model: a folder, its config.json, or a hub name; weights are only needed for the probe.
        rows: as ``fit`` takes them; None plans for ``num_rows`` of ``length`` tokens.
        config: the settings of the run.
        num_rows: rows to imagine.
        length: tokens in each of those.
        cards: sizes of memory in bytes; the micro-batch is chosen for the first, else for what is free here.
        probing: take two real steps on the longest batch, if the weights are here and fit.

    Raises:
        InputError: what training would refuse, or a model that cannot be simulated.
    """
    where = named(model, config)
    about, tokenizer = subject(where, rows, config, num_rows, length)
    recipe, setup, base = _decided(where, about, tokenizer, config)
    longest = _longest(about)
    free = cards[0] if cards else free_bytes(torch.device(recipe.device))
    choose_recompute(config, recipe, where.config, base.num_parameters, longest[0].length, free)
    setup = replace(setup, plan=replace(plan_of(config, recipe), compile=False))
    if config.micro_batch is None and free is not None:
        recipe.micro_batch, _ = fitting_micro_batch(setup, longest, recipe.batch_size, free)
    recipes.choose_packing(config, recipe, about.spec.kind, where.config, [row.length for row in about.rows])
    setup = replace(setup, plan=replace(plan_of(config, recipe), compile=False))
    columns = columns_of(setup, longest[: recipe.micro_batch], base)
    measured = _probed(where, about, setup, recipe, columns[2], config) if probing else None
    seconds, reason = _time(about, recipe, columns[2], measured)
    return CostPlan(
        model=where.name,
        found=about.found,
        num_parameters=base.num_parameters,
        dtype=recipe.dtype,
        device=recipe.device,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        accumulation=-(-recipe.batch_size // recipe.micro_batch),
        longest=about.spec.kind.size(longest[0]),
        tokens=sum(len(row.input_ids) for row in about.rows),
        epochs=recipe.epochs,
        num_steps=recipe.num_steps,
        seconds=seconds,
        seconds_reason=reason,
        free_bytes=free,
        columns=columns,
        fits=_fits(columns, cards),
        measured=measured,
        choices=tuple(recipe.choices),
        notes=_notes(columns, where, recipe, free, measured, probing, cards) + _on_disk(config, about, where, recipe),
    )


def _fits(columns: Sequence[Column], cards: Sequence[int]) -> tuple[Fits, ...]:
    return tuple(
        Fits(card, column.name, num_cards(column.memory, card))
        for card in cards
        for column in columns
        if column.memory is not None
    )


def _decided(
    where: Named, about: Subject, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
) -> tuple[Recipe, Setup, Base]:
    """Decide device, dtype, length and steps, and count the base."""
    recipe = Recipe(max_length=about.spec.max_length)
    pad = tokenizer.pad_token_id if tokenizer is not None else 0
    model_config: Any = where.config
    if about.spec.labels:
        model_config.num_labels = len(about.spec.labels)
        if model_config.pad_token_id is None:
            model_config.pad_token_id = pad
    method = config.resolved_method()
    heads = ["head"] if about.spec.labels else []
    setup = Setup(
        model_config,
        torch.float32,
        about.spec,
        method,
        config.attaching(heads),
        Plan(1, 1, 1, 1e-3),
        pad if isinstance(pad, int) else 0,
        config.trust_remote_code,
    )
    base = base_of(setup)
    if about.new is not None or config.train_vocabulary == "full":
        heads += trained(skeleton(setup), about.new, config)
        setup = replace(setup, attaching=config.attaching(heads))
        recipe.say("vocabulary", *said(about.new, config))
    recipes.choose_device(config, recipe)
    recipes.choose_dtype(config, recipe, base.num_parameters, machine_bytes(), where.stored())
    recipes.choose_steps(config, recipe, about.spec.kind.usual, len(about.rows), _width(where), base.num_parameters)
    dtype = DTYPES.get(recipe.dtype) or getattr(model_config, "dtype", None) or torch.float32
    return recipe, replace(setup, dtype=dtype), base


def _longest(about: Subject) -> list[EncodedRow]:
    size = about.spec.kind.size
    return sorted(about.rows, key=lambda row: (-row.length, -size(row)))[:256]


def _width(where: Named) -> int:
    return int(where.config.get_text_config().hidden_size)


def _probed(
    where: Named, about: Subject, setup: Setup, recipe: Recipe, column: Column, config: TrainConfig
) -> Measured | None:
    """Take the step for real, where the weights are here and there is room."""
    assert column.memory is not None
    free = free_bytes(torch.device(recipe.device))
    if not where.has_weights or (free is not None and not fits(column.memory.total, free)):
        return None
    base = load_base(
        where.source,
        about.spec.task,
        labels=about.spec.labels,
        dtype=recipe.dtype,
        device=recipe.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed,
    )
    base = extended(base, config)
    rows = _longest(about)[: min(recipe.batch_size, 2 * recipe.micro_batch)]
    kind = about.spec.kind
    found = probe(
        base.model, kind, about.spec.collator(base.tokenizer), setup.method, setup.attaching, setup.plan, rows
    )
    per_token = found.seconds / found.tokens
    return Measured(column.memory.above_weights, found.peak_bytes, per_token * _tokens_of_step(about, recipe))


def _tokens_of_step(about: Subject, recipe: Recipe) -> float:
    return sum(len(row.input_ids) for row in about.rows) / len(about.rows) * recipe.batch_size


def _time(about: Subject, recipe: Recipe, column: Column, measured: Measured | None) -> tuple[float | None, str]:
    """Return the run's seconds: a step's, times the steps, and a forward pass for each row to validate on."""
    evaluations = max(1, recipe.num_steps // max(recipe.eval_every, 1))
    passes = recipe.num_steps + VALIDATION_SHARE * evaluations * about.num_held / recipe.batch_size
    if measured is not None:
        return measured.step_seconds * passes, "from the measured step"
    # The count is of the longest rows; a step's rows have the mean length.
    longest = sum(len(row.input_ids) for row in _longest(about)[: recipe.micro_batch])
    flops = column.flops * _tokens_of_step(about, recipe) / max(longest, 1)
    speed = machine_speed(torch.device(recipe.device), DTYPES.get(recipe.dtype, torch.float32))
    return flops / speed * passes, (
        f"rough: {column.flops / max(longest, 1) / 1e6:,.1f} MFLOP a token at this machine's {speed / 1e9:,.0f} "
        "GFLOP/s in a matrix product"
    )


def machine_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of one large matrix product, the best of three."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _notes(
    columns: Sequence[Column],
    where: Named,
    recipe: Recipe,
    free: int | None,
    measured: Measured | None,
    probing: bool,
    cards: Sequence[int],
) -> tuple[str, ...]:
    notes = [f"{column.name}: {column.refused}" for column in columns if column.memory is None]
    if recipe.device != "cpu" or cards:
        notes.append("simulated with a CPU's kernels; a GPU's take somewhat other memory, for attention most of all")
    if recipe.dtype != "fp32":
        notes.append(
            f"full: weights, gradients and optimizer in {recipe.dtype}; an fp32 copy of the weights and an fp32 "
            "optimizer would add 8 bytes per parameter"
        )
    asked = columns[2].memory
    assert asked is not None
    if recipe.recompute:
        notes.append("recompute is on: what cheap operations made is made again in the backward pass")
    if free is not None and not fits(asked.total, free):
        notes.append("does not fit even with the smallest micro-batch: see the other columns, or more cards")
    if probing and measured is None:
        why = "it would not fit into this machine's memory" if where.has_weights else "the weights are not here"
        notes.append(f"no real step was taken: {why}")
    return tuple(notes)


def _on_disk(config: TrainConfig, about: Subject, where: Named, recipe: Recipe) -> tuple[str, ...]:
    """Return what is kept of frozen blocks, where that is asked for."""
    if not config.cache_prefix:
        return ()
    tokens, itemsize = sum(len(row.input_ids) for row in about.rows), DTYPES.get(recipe.dtype, torch.float32).itemsize
    size = tokens * _width(where) * itemsize / 2**20
    return (
        f"cache_prefix: the output of the frozen blocks takes up to {size:,.1f} MiB of disk ({tokens:,} tokens x "
        f"{_width(where):,} numbers of {itemsize} bytes); memory and time are those of the first epoch",
    )
