"""A pass over one short row before the first step: it shows which layers read the same input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.adapters import Handle
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.randomness import Randomness
from lorakit.training.tasks import Task


def show_readers(
    handle: Handle, task: Task, collate: Collator, rows: Sequence[EncodedRow], parameters: Sequence[nn.Parameter]
) -> None:
    """Let the shortest of some rows go through the model and back; gradients and random numbers are left alone.

    The fast path then computes in the first step as in all others: a run that is resumed gives the same bits.
    """
    device = next(handle.model.parameters()).device
    before = Randomness.now(device)
    batch = {key: value.to(device) for key, value in collate([min(rows, key=lambda row: len(row.input_ids))]).items()}

    shows_more = True
    while shows_more:
        loss = task.loss(handle.model, batch)
        if loss.requires_grad:
            torch.autograd.grad(loss, list(parameters), allow_unused=True)
        shows_more = handle.active.readers.settle()
    before.restore(device)
