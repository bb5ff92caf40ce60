"""What is proven at the end of every run, on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle
from lorakit.adapters.identity import digest
from lorakit.records import Proof
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.tasks import Task

NUM_ROWS = 8
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of merged and unmerged outputs, as a share of the largest output (at least 1).

fp32 sums of some thousand products in another order differ by 1e-6 to 1e-5; the half dtypes round the
merged weight itself, to 2^-11 and 2^-8 of each value.
"""


@dataclass(frozen=True)
class Reference:
    """The untouched base, before anything was attached: its digest, and its outputs on some rows."""

    digest: str
    outputs: Tensor


def tolerance(outputs: Tensor) -> float:
    """Return the stated bound on |merged - unmerged| for outputs of this size and dtype."""
    return TOLERANCES[outputs.dtype] * max(1.0, float(outputs.abs().max()))


@torch.no_grad()
def outputs_on(model: nn.Module, rows: Sequence[EncodedRow], collate: Collator, task: Task) -> Tensor:
    """Return the model's logits on a few rows, in evaluation mode; the model's mode is kept."""
    device = next(model.parameters()).device
    with evaluating(model):
        return task.outputs(model, {k: v.to(device) for k, v in collate(rows[:NUM_ROWS]).items()})


def take_reference(model: nn.Module, rows: Sequence[EncodedRow], collate: Collator, task: Task) -> Reference:
    """Measure a model to which nothing is attached yet."""
    return Reference(digest(model), outputs_on(model, rows, collate, task))


def prove(handle: Handle, reference: Reference, rows: Sequence[EncodedRow], collate: Collator, task: Task) -> Proof:
    """Compare the model with what it was, and merge once to see that merging changes nothing."""
    found = handle.digest()
    with handle.disabled():
        disabled = outputs_on(handle.model, rows, collate, task)
    adapted = outputs_on(handle.model, rows, collate, task)
    handle.merge()
    try:
        merged = outputs_on(handle.model, rows, collate, task)
    finally:
        handle.unmerge()
    return Proof(
        base_unchanged=found == reference.digest and handle.digest() == reference.digest,
        digest=found,
        merged_max_difference=float((merged - adapted).abs().max()),
        merged_tolerance=tolerance(adapted),
        disabled_equals_base=bool(torch.equal(disabled, reference.outputs)),
    )
