"""Several examples in one sequence, none of which sees another: the same step with less padding.

The examples of a micro-batch are put one behind another, positions begin at 0 in each, and no mask is given: from
such positions transformers reads off where an example ends, and lets attention see its own example alone. The first
token of an example is predicted by nothing. So a step has the very examples it has without packing, and its loss and
gradient are the same but for rounding; dropout draws other masks. Evaluations are padded as ever.

What pays was measured (``benchmarks/bench_packing.py``, ratios of steps of a frozen LLaMA with LoRA on a CPU):

- All examples in one sequence under a dense block-diagonal mask: 0.77 to 0.99 of the speed of padded rows of like
  length. Attention computes the square of the sequence, most of it masked.
- Sequences as wide as the longest example, filled by first-fit-decreasing: nothing is gained where rows of a batch are
  alike (E2E: 7 % padding, half of it rounding to 8), and nothing is packed there. Where lengths spread, as with few
  rows (43 % padding, of whose positions 19 % are spared), steps are 1.15 to 1.29 times as fast.
- Attention example by example: 0.95 to 1.1 of padded rows of like length. It would have to replace each model's own
  attention with its windows, caps and sinks; the gain does not carry that.

So ``auto`` packs on a CPU where it spares a twentieth of an epoch's positions or more, and there only the
micro-batches in which it spares a tenth; on a GPU where the model's attention takes examples by length (a flash
attention: then all of them make one sequence without padding); else not.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.bases.quiet import quiet_transformers
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import BatchOrder, Collator
from lorakit.training.data.encode import IGNORED, EncodedRow
from lorakit.training.tasks import Task
from lorakit.training.tasks.shortcuts import TOLERANCES

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FEWER = 0.9
"""Sequences for each example, at most, for a micro-batch to be packed: a mask costs some of what is spared."""
LEAST_SPARED = 0.05
"""Share of an epoch's positions that packing must spare to be taken unasked."""
MOST_BATCHES = 1000
TRIED = 13
FARTHEST = 3.0
"""The farthest of a few dozen positions, in units of the tolerance, which is for the mean over them."""
EXACT = 0.1
"""For another neighbour, likewise: the same products of the same shapes, so less than a bf16's last bit."""
CAUSAL = "CAUSAL_LM"


@dataclass(frozen=True)
class PackingCollator:
    """Turn encoded rows into tensors, several rows in one sequence where that spares positions.

    Attributes:
        padded: how rows become tensors that are not packed.
        whole: all rows make one sequence, for attention that takes examples by length; else a sequence is as wide as
            the longest row, since a mask costs the square of the width.
    """

    padded: Collator
    whole: bool = False

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Collate a batch.

        Returns:
            ``input_ids``, ``position_ids`` and ``labels`` ``[S, T]``, int64, without a mask; or what ``padded`` makes
            of the rows where packing would not spare a tenth of the sequences.
        """
        filled = self.filled([len(row.input_ids) for row in rows])
        return self.padded(rows) if filled is None else self.joined([[rows[i] for i in each] for each in filled])

    def places(self, rows: Sequence[EncodedRow]) -> list[tuple[int, int]]:
        """Return the sequence that each row is in, and where it begins there."""
        lengths = [len(row.input_ids) for row in rows]
        filled = self.filled(lengths)
        if filled is None:
            return self.padded.places(rows)
        found = {
            i: (sequence, sum(lengths[before] for before in each[:place]))
            for sequence, each in enumerate(filled)
            for place, i in enumerate(each)
        }
        return [found[i] for i in range(len(rows))]

    def filled(self, lengths: Sequence[int]) -> list[list[int]] | None:
        """Return which rows make each sequence, or None where they are better padded each on its own."""
        if self.whole:
            return [list(range(len(lengths)))] if len(lengths) > 1 else None
        found = first_fit_decreasing(lengths, self.padded.width(max(lengths)))
        return found if len(found) <= FEWER * len(lengths) else None

    def joined(self, sequences: Sequence[Sequence[EncodedRow]]) -> dict[str, Tensor]:
        """Return the tensors of sequences of rows, padded at their ends; the padding is an example of its own."""
        totals = [sum(len(row.input_ids) for row in rows) for rows in sequences]
        longest, step = max(totals), self.padded.pad_to
        width = -(-longest // step) * step if self.whole else self.padded.width(longest)
        ids, positions, labels = [], [], []
        for rows, total in zip(sequences, totals, strict=True):
            rest = width - total
            ids.append([token for row in rows for token in row.input_ids] + [self.padded.pad_token_id] * rest)
            positions.append([place for row in rows for place in range(len(row.input_ids))] + list(range(rest)))
            labels.append([label for row in rows for label in _learned(row)] + [IGNORED] * rest)
        found = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.tensor(values, dtype=torch.int64) for name, values in found.items()}


def _learned(row: EncodedRow) -> list[int]:
    """Return a row's labels without the first token's, which the example before it must not predict."""
    assert isinstance(row.labels, list)
    return [IGNORED, *row.labels[1:]]


def first_fit_decreasing(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Fill sequences of ``width`` with rows, the longest first, each into the first that has room.

    It takes at most 11/9 of the fewest possible sequences, and 6/9 of one (Dosa 2007).

    >>> first_fit_decreasing([5, 8, 3, 2], 8)
    [[1], [0, 2], [3]]
    """
    rooms: list[int] = []
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((i for i, room in enumerate(rooms) if lengths[row] <= room), None)
        if place is None:
            place = len(found)
            rooms.append(width)
            found.append([])
        rooms[place] -= lengths[row]
        found[place].append(row)
    return found


def batching_of(padded: Collator, packing: bool, model: nn.Module) -> Collator | PackingCollator:
    """Return what makes the batches of a training."""
    return PackingCollator(padded, takes_lengths(getattr(model, "config", None))) if packing else padded


def takes_lengths(model_config: Any) -> bool:
    """Tell whether a model's attention takes examples by their lengths (flash attention), at no cost for a mask."""
    return "flash" in str(getattr(model_config, "_attn_implementation", None))


# What pays -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """What the first batches of an epoch make a model compute.

    Attributes:
        tokens: of the rows; ``padded`` with the padding of each row; ``packed`` with packing.
    """

    tokens: int
    padded: int
    packed: int

    @property
    def padding(self) -> float:
        """Padding, as a share of the tokens."""
        return self.padded / self.tokens - 1

    @property
    def spared(self) -> float:
        """What packing spares, as a share of the positions with padding."""
        return 1 - self.packed / self.padded


def positions_of(
    lengths: Sequence[int], batch_size: int, micro_batch: int, seed: int, collate: PackingCollator
) -> Positions:
    """Count the positions of the first epoch's batches, 1,000 at most, as a run makes them."""
    tokens = padded = packed = 0
    for numbers in itertools.islice(BatchOrder(lengths, batch_size, seed), MOST_BATCHES):
        for start in range(0, len(numbers), micro_batch):
            sizes = [lengths[i] for i in numbers[start : start + micro_batch]]
            width, filled = collate.padded.width(max(sizes)), collate.filled(sizes)
            tokens += sum(sizes)
            padded += width * len(sizes)
            if filled is None:
                packed += width * len(sizes)
            else:
                packed += sum(sizes) if collate.whole else width * len(filled)
    return Positions(tokens, padded, packed)


def decided(
    asked: str, task: Task, model_config: PretrainedConfig, device: str, found: Positions | None
) -> tuple[bool, str]:
    """Return whether a run packs, and the reason.

    Args:
        asked: 'auto', 'on' or 'off'.
        task: what is learned.
        model_config: of the model that learns it.
        device: where.
        found: what packing spares; None where rows cannot be packed.
    """
    if asked == "off":
        return False, "as asked"
    if found is None:
        return False, obstacle(task, model_config) or ""
    spares = f"it spares {100 * found.spared:.1f} % of the positions; rows of like length have {_padding(found)}"
    if asked == "on":
        return True, f"as asked; {spares}"
    if takes_lengths(model_config) and device.startswith("cuda"):
        return True, "this attention takes examples by length, without any padding"
    if device.startswith("cuda"):
        return False, f"this attention would compute a mask; rows of like length have {_padding(found)}"
    return found.spared >= LEAST_SPARED, spares


def _padding(found: Positions) -> str:
    return f"{100 * found.padding:.1f} % padding"


def obstacle(task: Task, model_config: Any) -> str | None:
    """Return why the rows of a task cannot share a sequence at all, or None."""
    if getattr(model_config, "is_encoder_decoder", False):
        return "an encoder-decoder reads each input as a whole: rows of like length are padded together instead"
    if task.peft != CAUSAL:
        return f"a row of {task.name} has one answer for all of it: rows of like length are padded together instead"
    return None


# What leaks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Two short examples, packed and apart, through the model as it is to learn.

    Attributes:
        model: the class of it.
        scores: how far the scores at a position are from those of the example alone, as a share; the farthest.
        neighbour: how far the second example's are apart behind two other first ones.
        gradient: how far the gradient is from the one of padded rows, as a share.
        loss: likewise the loss.
        positions: the model takes the positions of tokens.
        tolerance: what rounding explains of ``scores``, ``gradient`` and ``loss``.
    """

    model: str
    scores: float
    neighbour: float
    gradient: float
    loss: float
    positions: bool
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether nothing passes from one example to the other."""
        worst = max(self.scores / FARTHEST, self.gradient, self.loss, self.neighbour / EXACT)
        return self.positions and worst <= self.tolerance

    def __str__(self) -> str:
        """Return what has been found, in one sentence."""
        largest = max(self.scores, self.gradient, self.loss)
        why = "" if self.positions else ", which takes no positions of tokens,"
        return (
            f"Examples are not packed: in {self.model}{why} they see one another (behind another example the scores, "
            f"the loss or the gradient change by up to {100 * largest:.2f} %, behind a third one by "
            f"{100 * self.neighbour:.2f} %; rounding explains {100 * self.tolerance:.2f} %); rows of like length are "
            "padded together instead."
        )


def tried(
    model: nn.Module, task: Task, padded: Collator, rows: Sequence[EncodedRow], parameters: Sequence[Tensor]
) -> Trial:
    """Run two short examples through the model, one behind the other and each alone, and say what differs.

    The adapters that act take part. The model's modes, its parameters' gradients and the generators are as before.
    """
    first, third, second = _short(rows, min(TRIED, task.spec.max_length // 2))
    # Both examples and no more make a sequence, without padding.
    collate = PackingCollator(replace(padded, pad_to=1), takes_lengths(getattr(model, "config", None)))
    device = next(model.parameters()).device
    takes = "position_ids" in inspect.signature(model.forward).parameters
    size = len(first.input_ids)
    sequences = [[first, second], [third, second], [second, first]]

    def tensors(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in batch.items() if takes or name != "position_ids"}

    @torch.no_grad()
    def scores(batch: dict[str, Tensor]) -> Tensor:
        return task.outputs(model, tensors(batch))

    with evaluating(model), quiet_transformers():
        batches = [[each] for each in sequences] if collate.whole else [sequences]
        packed = torch.cat([scores(collate.joined(each)) for each in batches])
        one, two = (scores(padded([row]))[0, : len(row.input_ids)] for row in (first, second))
        neighbour = apart(packed[1, size:], packed[0, size:])
        losses, gradients = [], []
        for batch in (padded(sequences[0]), collate.joined(sequences[:1])):
            with torch.enable_grad():
                loss = task.loss(model, tensors(batch))
                found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            losses.append(loss.detach()[None])
            gradients.append(torch.cat([each.float().flatten() for each in found if each is not None])[None])
    return Trial(
        type(model).__name__,
        apart(torch.cat([packed[0], packed[2]]), torch.cat([one, two, two, one])),
        neighbour,
        apart(gradients[1], gradients[0]),
        apart(losses[1], losses[0]),
        takes,
        TOLERANCES.get(packed.dtype, 0.0),
    )


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a row, ``[N, width]``, as a share of its size; infinite where not finite."""
    difference, size = (found.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    shares = torch.where(difference == 0, difference, difference / size)
    return math.inf if not bool(shares.isfinite().all()) else float(shares.max())


def _short(rows: Sequence[EncodedRow], most: int) -> tuple[EncodedRow, EncodedRow, EncodedRow]:
    """Return two rows of ``most`` tokens, the second with other tokens, and one of about half, from the longest."""
    row = max(rows, key=lambda row: len(row.input_ids))
    ids = (row.input_ids * most)[: most + 1]
    third = [*ids[1:most], ids[0]] if len(set(ids[:most])) > 1 else ids[:most]
    parts = ids[:most], third, ids[: most // 2 + 1][::-1]
    first, other, second = (replace(row, input_ids=part, labels=list(part), token_type_ids=None) for part in parts)
    return first, other, second
