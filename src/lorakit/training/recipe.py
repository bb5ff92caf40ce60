"""The recipe: settings that work for this model, this data and this machine, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lorakit.errors import ConfigError
from lorakit.methods import Method, Update
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.records import Choice
from lorakit.training.config import SHORTHANDS, TrainConfig
from lorakit.training.optimizers import LARGER_RATE
from lorakit.training.packing import PackingCollator, decided, obstacle, positions_of, takes_lengths
from lorakit.training.plan import Plan
from lorakit.training.processor import bf16_unit, cores, in_words
from lorakit.training.schedule import Schedule
from lorakit.training.tasks import Task, Usual

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LEARNING_RATE = 1e-3
REFERENCE_WIDTH = 512
MANY_ROWS = 2000
MOST_STEPS_UNMEASURED = 1000


@dataclass
class Recipe:
    """The settings of one run, all decided.

    Attributes:
        usual_lr: what the learning rate would be if none were asked for.
        choices: every setting in words, in the order they were decided.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    max_length: int = 0
    batch_size: int = 0
    micro_batch: int = 0
    epochs: float = 0.0
    num_steps: int = 0
    packing: bool = False
    recompute: bool = False
    lr: float = 0.0
    usual_lr: float = 0.0
    eval_every: int = 0
    choices: list[Choice] = field(default_factory=list)

    def say(self, name: str, value: object, reason: str) -> None:
        """Note a choice."""
        self.choices.append(Choice(name, str(value), reason))


def choose_device(config: TrainConfig, recipe: Recipe) -> None:
    """Decide the device: what was asked for, else a GPU if there is one."""
    if config.device != "auto":
        recipe.device = config.device
        recipe.say("device", recipe.device, "as asked")
    elif torch.cuda.is_available():
        recipe.device = "cuda"
        recipe.say("device", recipe.device, torch.cuda.get_device_name())
    else:
        recipe.device = "cpu"
        recipe.say("device", recipe.device, f"no GPU here; {in_words(torch.get_num_threads(), cores())}")


def choose_dtype(
    config: TrainConfig,
    recipe: Recipe,
    num_parameters: int | None,
    memory_bytes: int | None,
    stored: str | None = None,
) -> None:
    """Decide the dtype of the base: bf16 on a GPU that has it; on a CPU fp32 where it fits.

    A checkpoint that is stored in bf16 stays in it on a CPU that multiplies bf16 faster: no number of it is rounded
    for that. One that is stored in more is not rounded for speed.

    Args:
        config: what was asked for.
        recipe: where the choice is noted.
        num_parameters: of the base, None where it is not known.
        memory_bytes: of the machine, None where it is not known.
        stored: the dtype most of the checkpoint's numbers have ('bf16'), None where it is not known.
    """
    if config.dtype != "auto":
        recipe.dtype = config.dtype
        recipe.say("dtype", recipe.dtype, "as asked")
    elif recipe.device.startswith("cuda"):
        recipe.dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        recipe.say("dtype", recipe.dtype, "half the memory of fp32; the adapter itself stays in fp32")
    elif num_parameters is not None and memory_bytes is not None and 4 * num_parameters > memory_bytes // 2:
        recipe.dtype = "bf16"
        recipe.say("dtype", "bf16", "fp32 weights would take more than half of the memory")
    elif stored == "bf16" and recipe.device == "cpu" and (unit := bf16_unit()) is not None:
        recipe.dtype = "bf16"
        recipe.say("dtype", "bf16", f"what the checkpoint is stored in; the processor multiplies it fast ({unit})")
    else:
        recipe.dtype = "fp32"
        slow = stored == "bf16"
        recipe.say("dtype", "fp32", "faster than bf16 on this CPU" if slow else "most exact; nothing is rounded")


def choose_length(config: TrainConfig, recipe: Recipe, usual: Usual, context: int) -> None:
    """Decide how many tokens a row may have.

    Raises:
        ConfigError: more than the model's context was asked for.
    """
    if config.max_length is not None and config.max_length > context:
        raise ConfigError(f"max_length {config.max_length:,} is above the model's context of {context:,} tokens.")
    if config.max_length is not None:
        recipe.max_length = config.max_length
        recipe.say("max_length", recipe.max_length, "as asked")
    else:
        recipe.max_length = min(context, usual.max_length)
        full = recipe.max_length == context
        recipe.say(
            "max_length", recipe.max_length, "the model's context" if full else f"enough; the context is {context:,}"
        )


def choose_steps(
    config: TrainConfig, recipe: Recipe, usual: Usual, num_rows: int, width: int, num_parameters: int
) -> None:
    """Decide batch size, epochs, steps, learning rate and evaluations for ``num_rows`` and a model of this width."""
    _choose_batch(config, recipe, usual, num_rows, num_parameters)
    per_epoch = math.ceil(num_rows / recipe.batch_size)
    if config.epochs is not None:
        recipe.epochs = config.epochs
        recipe.say("epochs", f"{recipe.epochs:g}", "as asked")
    else:
        needed = math.ceil(usual.fewest_steps / per_epoch)
        recipe.epochs = float(min(max(usual.epochs, needed), usual.most_epochs))
        few = needed > usual.epochs
        recipe.say(
            "epochs", f"{recipe.epochs:g}", f"{num_rows:,} rows are few" if few else f"enough for {num_rows:,} rows"
        )
    recipe.num_steps = max(1, math.ceil(per_epoch * recipe.epochs))
    if config.max_steps is not None and config.max_steps < recipe.num_steps:
        recipe.num_steps = config.max_steps
        recipe.say("steps", recipe.num_steps, "max_steps, as asked")
    else:
        recipe.say("steps", recipe.num_steps, f"{per_epoch:,} per epoch")
    _choose_rate(config, recipe, width)
    _choose_evaluations(config, recipe, per_epoch)


def _choose_rate(config: TrainConfig, recipe: Recipe, width: int) -> None:
    usual = LEARNING_RATE * min(1.0, (REFERENCE_WIDTH / width) ** 0.75) * LARGER_RATE[config.optimizer]
    recipe.usual_lr = float(f"{usual:.1g}")
    if config.lr is not None:
        recipe.lr = config.lr
        recipe.say("lr", f"{recipe.lr:g}", "as asked")
    else:
        recipe.lr = recipe.usual_lr
        adamw = config.optimizer == "adamw"
        than = "some ten times full fine-tuning's" if adamw else f"a large one with {config.optimizer}"
        recipe.say("lr", f"{recipe.lr:g}", f"adapters like {than}; the model is {width:,} wide")
    warmup = Schedule(config.schedule, recipe.num_steps, config.warmup).num_warmup
    asked = {"optimizer", "schedule", "warmup"} & config.model_fields_set
    recipe.say(
        "optimizer",
        f"{config.optimizer}, {config.schedule} after {warmup:,} step{'' if warmup == 1 else 's'} of warm-up",
        "as asked" if asked else "steady for most tasks",
    )


def _choose_evaluations(config: TrainConfig, recipe: Recipe, per_epoch: int) -> None:
    if config.eval_every is not None:
        recipe.eval_every = config.eval_every
        reason = "as asked"
    else:
        recipe.eval_every = math.ceil(per_epoch / math.ceil(per_epoch / MOST_STEPS_UNMEASURED))
        reason = "each epoch" if recipe.eval_every == per_epoch else f"an epoch has {per_epoch:,} steps"
    ends = f"; the run ends after {config.patience} without a better one" if config.patience is not None else ""
    recipe.say("eval_every", f"{recipe.eval_every:,} steps", f"{reason}; the best adapter is kept{ends}")


def _choose_batch(config: TrainConfig, recipe: Recipe, usual: Usual, num_rows: int, num_parameters: int) -> None:
    if config.batch_size is not None:
        recipe.batch_size = min(config.batch_size, num_rows)
        fits = recipe.batch_size == config.batch_size
        recipe.say("batch_size", recipe.batch_size, "as asked" if fits else "all rows: there are no more")
    else:
        size = usual.batch_size if num_rows < MANY_ROWS else usual.batch_size_of_many
        recipe.batch_size = min(size, max(1, num_rows // 8))
        recipe.say("batch_size", recipe.batch_size, f"usual for {num_rows:,} rows")
    if config.micro_batch is not None:
        recipe.micro_batch = min(config.micro_batch, recipe.batch_size)
        recipe.say("micro_batch", recipe.micro_batch, "as asked")
    else:
        large = num_parameters > 2e9
        recipe.micro_batch = min(recipe.batch_size, 2) if large else recipe.batch_size
        if large:
            recipe.say("micro_batch", recipe.micro_batch, f"the model has {num_parameters / 1e9:.1f} G parameters")


def choose_packing(
    config: TrainConfig, recipe: Recipe, task: Task, model_config: PretrainedConfig, lengths: Sequence[int]
) -> None:
    """Decide whether the rows of a micro-batch, with so many tokens each, share sequences."""
    found = None
    if config.packing != "off" and obstacle(task, model_config) is None and lengths:
        collate = PackingCollator(task.collator(0), takes_lengths(model_config))
        found = positions_of(lengths, recipe.batch_size, recipe.micro_batch, config.seed, collate)
    recipe.packing, reason = decided(config.packing, task, model_config, recipe.device, found)
    if recipe.packing or config.packing != "auto":
        recipe.say("packing", "on" if recipe.packing else "off", reason)


def say_method(config: TrainConfig, recipe: Recipe, method: Method, targets: list[str], coverage: str) -> None:
    """Note what the adapter is and where it acts."""
    fields = method.summary()
    told = any(getattr(config, name) is not None for name in SHORTHANDS) or config.method != "lora"
    asked = "as asked" if told else "a good start for most tasks"
    sizes = [f"{name} {_short(fields[name])}" for name in ("rank", "alpha") if name in fields]
    init = fields.get("init") or {"name": "kaiming"}
    sizes += [f"init {init['name']}"] if init["name"] != "kaiming" else []
    recipe.say("method", ", ".join([method.name, *sizes]), asked)
    shown = ", ".join(targets[:6]) + (f" and {len(targets) - 6} more" if len(targets) > 6 else "")
    asked = "as asked; " if config.targets != "all-linear" else "every linear layer; "
    recipe.say("targets", shown, f"{asked}{coverage}")


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def say_ranks(recipe: Recipe, asked: LoRA, chosen: Method, updates: Mapping[str, Update]) -> None:
    """Note the ranks that were chosen for layers from the examples."""
    pairs = {path: update for path, update in updates.items() if isinstance(update, LowRankUpdate)}
    ranks = {path: int(update.A.shape[-2]) for path, update in pairs.items()}
    spent = sum(update.A.numel() + update.B.numel() for update in pairs.values())
    alone = list(chosen.rank_pattern.values()).count(0) if isinstance(chosen, LoRA) else 0
    low, high, mean = min(ranks.values()), max(ranks.values()), sum(ranks.values()) / len(ranks)
    found = f"{low} to {high}, mean {mean:.1f}, in {len(ranks):,} layers" + (f"; {alone:,} left alone" if alone else "")
    most = next(path for path, rank in ranks.items() if rank == high)
    reason = f"by the layers' {asked.rank_by}: {spent:,} of {asked.budget or 0:,} numbers, most in {most}"
    recipe.say("ranks", found, reason)


def plan_of(config: TrainConfig, recipe: Recipe) -> Plan:
    """Return what the loop is to do."""
    return Plan(
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        lr=recipe.lr,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
        dtype=recipe.dtype,
        optimizer=config.optimizer,
        schedule=config.schedule,
        warmup=config.warmup,
        eval_every=recipe.eval_every,
        save_every=config.save_every,
        patience=config.patience,
        packing=recipe.packing,
        grad_checkpointing=config.grad_checkpointing,
        recompute=recipe.recompute,
        compile=config.compile,
        halve_micro_at=config.halve_micro_at,
        usual_lr=recipe.usual_lr,
    )
