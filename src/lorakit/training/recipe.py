"""The recipe: settings that work for this model, this data and this machine, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lorakit.errors import ConfigError
from lorakit.methods import Method
from lorakit.records import Choice
from lorakit.training.config import TrainConfig

LEARNING_RATE = 1e-3
REFERENCE_WIDTH = 512
LONGEST_CLASSIFIED = 512
MANY_ROWS = 2000
FEWEST_STEPS = {"classification": 250, "generation": 200, "language-modeling": 200}
MOST_EPOCHS = {"classification": 15, "generation": 3, "language-modeling": 3}
USUAL_EPOCHS = {"classification": 5, "generation": 2, "language-modeling": 2}


@dataclass
class Recipe:
    """The settings of one run, all decided.

    Attributes:
        choices: every setting in words, in the order they were decided.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    max_length: int = 0
    batch_size: int = 0
    micro_batch: int = 0
    epochs: float = 0.0
    num_steps: int = 0
    lr: float = 0.0
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
        recipe.say("device", recipe.device, f"no GPU here; {torch.get_num_threads()} threads")


def choose_dtype(config: TrainConfig, recipe: Recipe, num_parameters: int | None, memory_bytes: int | None) -> None:
    """Decide the dtype of the base: fp32 on a CPU where it fits, bf16 on a GPU that has it."""
    if config.dtype != "auto":
        recipe.dtype = config.dtype
        recipe.say("dtype", recipe.dtype, "as asked")
    elif recipe.device.startswith("cuda"):
        recipe.dtype = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        recipe.say("dtype", recipe.dtype, "half the memory of fp32; the adapter itself stays in fp32")
    elif num_parameters is not None and memory_bytes is not None and 4 * num_parameters > memory_bytes // 2:
        recipe.dtype = "bf16"
        recipe.say("dtype", "bf16", "fp32 weights would take more than half of the memory")
    else:
        recipe.dtype = "fp32"
        recipe.say("dtype", "fp32", "fastest and most exact on a CPU")


def choose_length(config: TrainConfig, recipe: Recipe, task: str, context: int) -> None:
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
        recipe.max_length = min(context, LONGEST_CLASSIFIED if task == "classification" else 2048)
        full = recipe.max_length == context
        recipe.say(
            "max_length", recipe.max_length, "the model's context" if full else f"enough; the context is {context:,}"
        )


def choose_steps(
    config: TrainConfig, recipe: Recipe, task: str, num_rows: int, width: int, num_parameters: int
) -> None:
    """Decide batch size, epochs, steps and learning rate for ``num_rows`` and a model of this width."""
    _choose_batch(config, recipe, task, num_rows, num_parameters)
    per_epoch = math.ceil(num_rows / recipe.batch_size)
    if config.epochs is not None:
        recipe.epochs = config.epochs
        recipe.say("epochs", f"{recipe.epochs:g}", "as asked")
    else:
        needed = math.ceil(FEWEST_STEPS[task] / per_epoch)
        recipe.epochs = float(min(max(USUAL_EPOCHS[task], needed), MOST_EPOCHS[task]))
        few = needed > USUAL_EPOCHS[task]
        recipe.say(
            "epochs", f"{recipe.epochs:g}", f"{num_rows:,} rows are few" if few else f"enough for {num_rows:,} rows"
        )
    recipe.num_steps = max(1, math.ceil(per_epoch * recipe.epochs))
    if config.max_steps is not None and config.max_steps < recipe.num_steps:
        recipe.num_steps = config.max_steps
        recipe.say("steps", recipe.num_steps, "max_steps, as asked")
    else:
        recipe.say("steps", recipe.num_steps, f"{per_epoch:,} per epoch")
    if config.lr is not None:
        recipe.lr = config.lr
        recipe.say("lr", f"{recipe.lr:g}", "as asked")
    else:
        recipe.lr = float(f"{LEARNING_RATE * min(1.0, (REFERENCE_WIDTH / width) ** 0.75):.1g}")
        recipe.say(
            "lr", f"{recipe.lr:g}", f"adapters like some ten times full fine-tuning's; the model is {width:,} wide"
        )


def _choose_batch(config: TrainConfig, recipe: Recipe, task: str, num_rows: int, num_parameters: int) -> None:
    if config.batch_size is not None:
        recipe.batch_size = min(config.batch_size, num_rows)
        fits = recipe.batch_size == config.batch_size
        recipe.say("batch_size", recipe.batch_size, "as asked" if fits else "all rows: there are no more")
    else:
        usual = 8 if task != "classification" else 16 if num_rows < MANY_ROWS else 32
        recipe.batch_size = min(usual, max(1, num_rows // 8))
        recipe.say("batch_size", recipe.batch_size, f"usual for {num_rows:,} rows")
    if config.micro_batch is not None:
        recipe.micro_batch = min(config.micro_batch, recipe.batch_size)
        recipe.say("micro_batch", recipe.micro_batch, "as asked")
    else:
        large = num_parameters > 2e9
        recipe.micro_batch = min(recipe.batch_size, 2) if large else recipe.batch_size
        if large:
            recipe.say("micro_batch", recipe.micro_batch, f"the model has {num_parameters / 1e9:.1f} G parameters")


def say_method(config: TrainConfig, recipe: Recipe, method: Method, targets: list[str], coverage: str) -> None:
    """Note what the adapter is and where it acts."""
    fields = method.summary()
    asked = "as asked" if config.rank is not None or config.method != "lora" else "a good start for most tasks"
    sizes = [f"{name} {fields[name]:g}" for name in ("rank", "alpha") if name in fields]
    recipe.say("method", ", ".join([method.name, *sizes]), asked)
    shown = ", ".join(targets[:6]) + (f" and {len(targets) - 6} more" if len(targets) > 6 else "")
    asked = "as asked; " if config.targets != "all-linear" else "every linear layer; "
    recipe.say("targets", shown, f"{asked}{coverage}")
