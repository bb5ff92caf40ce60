"""``CachedPrefix``: the frozen blocks' output for each row, computed when a row is first needed, read from disk after.

A row's states are computed with those of its group, in a pass that ends where the frozen blocks do. So every step takes
the states of its rows from the file, the first one too: what a step computes does not depend on when it was reached,
and a resumed run, whose file is empty, gives the same bits as one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from lorakit.training.data.batches import Collator
from lorakit.training.data.encoded import EncodedRow
from lorakit.training.packing import PackingCollator
from lorakit.training.prefix.blocks import Prefix, joined
from lorakit.training.prefix.places import Places, on_disk
from lorakit.training.randomness import own_generators
from lorakit.training.tasks import Task


class CachedPrefix:
    """The output of a model's frozen lowest blocks for all training rows.

    Attributes:
        prefix: the blocks.
        places: where each row's states are.
    """

    def __init__(
        self,
        prefix: Prefix,
        places: Places,
        model: nn.Module,
        task: Task,
        batching: Collator | PackingCollator,
        padded: Collator,
        rows: Sequence[EncodedRow],
    ) -> None:
        """Take what a step needs.

        Args:
            prefix: the frozen blocks.
            places: of ``rows``.
            model: that has the blocks.
            task: runs the model.
            batching: makes the batches of a training.
            padded: makes those in which states are computed.
            rows: that are trained on.
        """
        self.prefix, self.places = prefix, places
        self.model, self.task, self.batching, self.padded, self.rows = model, task, batching, padded, rows
        self.device = next(model.parameters()).device
        self._states: Tensor | None = None
        self._known = bytearray()

    @property
    def num_bytes(self) -> int:
        """What is kept on disk."""
        return self.places.num_tokens * self.prefix.width * self.prefix.dtype.itemsize

    @contextlib.contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """Within the block there is room for the states in a nameless file in ``folder``; none is known at first.

        Raises:
            TrainingError: the disk is full.
        """
        with on_disk(folder, self.places.num_tokens, self.prefix.width, self.prefix.dtype) as states:
            self._states, self._known = states, bytearray(len(self.places.groups))
            try:
                yield
            finally:
                self._states = None

    @contextlib.contextmanager
    def skipped(self, rows: Sequence[EncodedRow], batch: dict[str, Tensor]) -> Iterator[None]:
        """Within the block the frozen blocks answer a pass over ``batch``, made of ``rows``, with what is known."""
        assert self._states is not None
        slots = self.places.slots(rows)
        for group in sorted({self.places.group(slot) for slot in slots}):
            if not self._known[group]:
                self._compute(group)
        found = [self._states[self.places.span(slot)] for slot in slots]
        states = joined(found, self.batching.places(rows), batch["input_ids"].shape)
        with self.prefix.answering(states.to(self.device)):
            yield

    def _compute(self, group: int) -> None:
        """Run a group's rows through the frozen blocks; random numbers are left alone."""
        assert self._states is not None
        slots = self.places.groups[group]
        rows = [self.rows[self.places.rows[slot]] for slot in slots]
        with own_generators(self.device):
            states = padded_states(self.prefix, self.model, self.task, self.padded, rows)
        for slot, row, own in zip(slots, rows, states, strict=True):
            self._states[self.places.span(slot)] = own[: len(row.input_ids)]
        self._known[group] = True


def kept_beside(cached: CachedPrefix | None, run: Path | None) -> contextlib.AbstractContextManager[None]:
    """Within the block a run's states have room: on the disk of its folder, else among the temporary files."""
    if cached is None:
        return contextlib.nullcontext()
    return cached.kept_in(run if run is not None else Path(tempfile.gettempdir()))


def padded_states(prefix: Prefix, model: nn.Module, task: Task, padded: Collator, rows: Sequence[EncodedRow]) -> Tensor:
    """Run rows through the frozen blocks, each in a sequence of its own; ``[rows, T, width]``."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in padded(rows).items()}
    return prefix.states_of(lambda: task.outputs(model, batch))
