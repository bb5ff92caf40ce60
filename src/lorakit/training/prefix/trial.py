"""Whether a run keeps the output of its frozen blocks: refused where it cannot, tried on the model itself."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.adapters import Handle
from lorakit.errors import ConfigError, bullet_list
from lorakit.files import existing_part
from lorakit.training.config import TrainConfig
from lorakit.training.data.encoded import EncodedRow
from lorakit.training.mode import training_mode
from lorakit.training.packing import apart, batching_of
from lorakit.training.prefix.blocks import hidden_of, joined
from lorakit.training.prefix.cached import CachedPrefix, padded_states
from lorakit.training.prefix.find import find_prefix
from lorakit.training.prefix.places import Places
from lorakit.training.prepare import LEAST_FREE_BYTES, Prepared
from lorakit.training.processes import Processes
from lorakit.training.randomness import own_generators
from lorakit.training.tasks.shortcuts import TOLERANCES

EXACT = 0.01
"""For the very states of a pass, in units of the tolerance: the same products of the same shapes."""
FEW_ROWS, FEW_TOKENS = 4, 2048


@dataclass(frozen=True)
class Trial:
    """A micro-batch through the model as it is to learn, whole and without its frozen blocks.

    Attributes:
        model: the class of it.
        same: how far the loss is from that of the whole model, as a share, with the states of that very pass.
        alone: likewise with the states of each row alone.
        states: how far these are from those in the batch, as a share.
        tolerance: what rounding explains of ``alone`` and ``states``.
    """

    model: str
    same: float
    alone: float
    states: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the loss is the whole model's."""
        return max(self.same / EXACT, self.alone, self.states) <= self.tolerance

    def __str__(self) -> str:
        """Return what has been found, in one sentence."""
        return (
            f"The frozen blocks are computed in every pass: in {self.model} the loss without them changes by "
            f"{100 * self.same:.2g} %, and by {100 * self.alone:.2g} % with the states of rows computed alone, "
            f"which differ by {100 * self.states:.2g} % (rounding explains {100 * self.tolerance:.2g} %)."
        )


def tried_prefix(
    prepared: Prepared, config: TrainConfig, handle: Handle, name: str, processes: Processes
) -> CachedPrefix | None:
    """Return what a run keeps of its frozen blocks where that was asked for, and say what it takes.

    None where nothing was asked for, or where the loss would change by more than rounding; the notes say so then.

    Raises:
        ConfigError: it cannot be done, or would have no effect.
    """
    if not config.cache_prefix:
        return None
    recipe, model, task = prepared.recipe, prepared.base.model, prepared.spec.kind
    _check_use(prepared, config, processes)
    padded = prepared.spec.collator(prepared.base.tokenizer)
    few = _few(prepared.train)
    batch = {key: value.to(next(model.parameters()).device) for key, value in padded(few).items()}
    prefix = find_prefix(handle, name, lambda: task.outputs(model, batch))
    places = Places(prepared.train, recipe.micro_batch)
    batching = batching_of(padded, recipe.packing, model)
    cached = CachedPrefix(prefix, places, model, task, batching, padded, prepared.train)
    _check_room(cached.num_bytes, room_of(config.output))
    trial = tried(cached, _few(prepared.train, recipe.micro_batch))
    if not trial.holds:
        recipe.say("cache_prefix", "off", f"in {trial.model} the loss without the frozen blocks is another one")
        prepared.notes.append(str(trial))
        return None
    size = f"{places.num_tokens:,} tokens x {prefix.width:,} numbers, {cached.num_bytes / 2**20:,.1f} MiB of disk"
    recipe.say("cache_prefix", "on", f"{prefix} is frozen; its output takes {size} until the run ends")
    return cached


def room_of(output: str | None) -> Path:
    """Return the folder in which there must be room: the run folder's, as far as it is there, or one for a while."""
    return existing_part(tempfile.gettempdir() if output is None else output)


def _check_use(prepared: Prepared, config: TrainConfig, processes: Processes) -> None:
    """Refuse what shows without running the model.

    Raises:
        ConfigError: all that is wrong.
    """
    problems = []
    if config.compile:
        problems.append("cache_prefix and compile cannot be combined: leave one of them out.")
    if processes.several:
        problems.append(f"cache_prefix is for one process, and {processes.count} train here: leave it out.")
    if prepared.spec.encoder_decoder:
        problems.append("cache_prefix is for models of one list of blocks, not for an encoder-decoder: leave it out.")
    if prepared.recipe.num_steps <= math.ceil(len(prepared.train) / prepared.recipe.batch_size):
        problems.append(
            f"cache_prefix has no use in a run of {prepared.recipe.epochs:g} epochs that reads each row once: leave it "
            "out, or train for more epochs."
        )
    if problems:
        raise ConfigError(bullet_list(problems))


def _check_room(num_bytes: int, folder: Path) -> None:
    """Refuse where the disk would be full.

    Raises:
        ConfigError: there is not enough room.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes + LEAST_FREE_BYTES > free:
        raise ConfigError(
            f"cache_prefix needs {num_bytes / 2**20:,.1f} MiB of disk for the output of the frozen blocks; "
            f"{free / 2**20:,.1f} MiB are free at '{folder}'. Free some space, choose another place for the run, or "
            "leave cache_prefix out."
        )


def _few(rows: Sequence[EncodedRow], most: int = FEW_ROWS) -> list[EncodedRow]:
    """Return the first rows, ``most`` and 2,048 tokens of them at most, but two where there are two."""
    found: list[EncodedRow] = []
    for row in rows[: max(2, most)]:
        if len(found) > 1 and sum(len(each.input_ids) for each in [*found, row]) > FEW_TOKENS:
            break
        found.append(row)
    return found


@torch.no_grad()
def tried(cached: CachedPrefix, rows: Sequence[EncodedRow]) -> Trial:
    """Compare the loss of a micro-batch without the frozen blocks with the whole model's, adapters and all."""
    prefix, model, task, device = cached.prefix, cached.model, cached.task, cached.device
    shortcuts = task.shortcuts(model, cached.padded, rows)
    batch = {key: value.to(device) for key, value in cached.batching(rows).items()}
    places, shape = cached.batching.places(rows), batch["input_ids"].shape
    whole: list[Tensor] = []
    hook = prefix.blocks[-1].register_forward_hook(lambda module, args, out: whole.append(hidden_of(out)))

    def loss() -> float:
        with own_generators(device, seed=0):
            return float(task.loss(model, dict(batch), shortcuts))

    with training_mode(model, grad_checkpointing=False):
        try:
            plain = loss()
        finally:
            hook.remove()
        spans = [slice(start, start + len(row.input_ids)) for row, (_, start) in zip(rows, places, strict=True)]
        inside = [whole[0][sequence, span] for span, (sequence, _) in zip(spans, places, strict=True)]
        alone = [padded_states(prefix, model, task, cached.padded, [row])[0, : len(row.input_ids)] for row in rows]
        losses = [plain]
        for states in (whole[0], joined(alone, places, shape)):
            with prefix.answering(states):
                losses.append(loss())
    shares = [_whole(torch.tensor(each), torch.tensor(plain)) for each in losses[1:]]
    difference = _whole(torch.cat(alone), torch.cat(inside))
    # A block that is run twice in a pass gives two outputs, of which one is kept.
    same = shares[0] if len(whole) == 1 else math.inf
    return Trial(type(model).__name__, same, shares[1], difference, TOLERANCES.get(prefix.dtype, 0.0))


def _whole(found: Tensor, expected: Tensor) -> float:
    """Return how far a tensor is from another one as a whole."""
    return apart(found.reshape(1, -1), expected.reshape(1, -1))
