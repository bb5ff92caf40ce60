"""What is measured around a training: the memory of a step, and everything that the summary says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from lorakit.adapters import Handle
from lorakit.adapters.spectrum import spectra
from lorakit.errors import TrainingError
from lorakit.records import Evaluation, RunSummary, Sample
from lorakit.training.data.encode import EncodedRow
from lorakit.training.diagnosis import unreached
from lorakit.training.loop import Measure
from lorakit.training.memory import peak_bytes
from lorakit.training.mode import training_mode
from lorakit.training.observe import Observer
from lorakit.training.packing import batching_of
from lorakit.training.plan import Outcome
from lorakit.training.prepare import Prepared
from lorakit.training.proof import Reference, prove
from lorakit.training.randomness import own_generators
from lorakit.training.start import Start


def step_memory(prepared: Prepared, handle: Handle, name: str, micro_batch: int, grad_checkpointing: bool) -> int:
    """Return the tensor bytes of a step on the longest micro-batch, of the adapter itself and of AdamW's state."""
    model = prepared.base.model
    device = next(model.parameters()).device
    parameters = list(handle.parameters(name).values())
    step, _ = _longest_step(prepared, micro_batch)
    try:
        with own_generators(device), training_mode(model, grad_checkpointing, prepared.recipe.recompute):
            peak = peak_bytes(step, device)
    finally:
        for parameter in parameters:
            parameter.grad = None
    # The adapter itself, and AdamW's two moments; the gradients are among what the step has made.
    return peak + sum(3 * parameter.numel() * parameter.element_size() for parameter in parameters)


def seconds_per_token(
    prepared: Prepared, handle: Handle, name: str, micro_batch: int, grad_checkpointing: bool
) -> float:
    """Return the seconds of a step per input token, by a second pass over the longest micro-batch.

    The forward and backward pass of one micro-batch is taken for real and its time spread over its tokens; the
    optimizer's own part is left out, since an adapter is small.
    """
    model, task = prepared.base.model, prepared.spec.kind
    step, longest = _longest_step(prepared, micro_batch)
    device = next(model.parameters()).device
    try:
        with own_generators(device), training_mode(model, grad_checkpointing, prepared.recipe.recompute):
            begun = time.perf_counter()
            step().item()
            taken = time.perf_counter() - begun
    finally:
        for parameter in handle.parameters(name).values():
            parameter.grad = None
    return taken / max(1, sum(task.size(row) for row in longest))


def _longest_step(prepared: Prepared, micro_batch: int) -> tuple[Callable[[], Tensor], list[EncodedRow]]:
    """Return the forward and backward pass of the longest micro-batch, which gives its loss, and the rows of it."""
    model, task = prepared.base.model, prepared.spec.kind
    longest = sorted(prepared.train, key=lambda row: -task.size(row))[:micro_batch]
    device = next(model.parameters()).device
    collate = prepared.spec.collator(prepared.base.tokenizer)
    batching = batching_of(collate, prepared.recipe.packing, model)
    batch = {k: v.to(device) for k, v in batching(longest).items()}
    shortcuts = task.shortcuts(model, collate, longest)
    units = max(1, sum(task.units(row) for row in longest))

    def step() -> Tensor:
        loss = task.loss(model, batch, shortcuts) / units
        if not loss.requires_grad:
            raise TrainingError(unreached().text)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step, longest


def validation(prepared: Prepared, start: Start, asked: Sequence[EncodedRow]) -> Measure:
    """Return what the loop measures at each evaluation: all held-out rows, and answers to a few questions."""
    model, tokenizer = prepared.base.model, prepared.base.tokenizer
    task, collate = prepared.spec.kind, prepared.spec.collator(tokenizer)
    followed = task.followed(asked)
    rows, before = [asked[place] for place in followed], [start.answers[place] for place in followed]

    def measure() -> tuple[Evaluation, Sequence[Sample]]:
        found = task.evaluate(model, prepared.held, collate)
        pairs = zip(rows, before, task.answer(model, tokenizer, rows), strict=True)
        return found, [Sample(row.prompt, row.expected, first, second) for row, first, second in pairs]

    return measure


def summarised(
    prepared: Prepared,
    handle: Handle,
    name: str,
    start: Start,
    asked: Sequence[EncodedRow],
    outcome: Outcome,
    memory: int,
    adapter_bytes: int,
    reference: Reference,
    observer: Observer,
) -> RunSummary:
    """Measure the adapted model, prove what is promised, and return everything a run reports."""
    from lorakit.version import __version__

    base, spec = prepared.base, prepared.spec
    task, collate = spec.kind, spec.collator(base.tokenizer)
    observer.stage("measuring the adapted model")
    after = task.evaluate(base.model, prepared.held, collate)
    answers = task.answer(base.model, base.tokenizer, asked)
    observer.stage("proving that the base is untouched and that merging changes nothing")
    proof = prove(handle, reference, prepared.held, collate, task)
    counts = handle.counts(name)
    trained_bytes = sum(p.numel() * p.element_size() for p in handle.parameters(name).values())
    early = [f"Ended at step {outcome.steps:,}: nothing became better any more."] if outcome.early else []
    assert start.before is not None
    return RunSummary(
        task=spec.task,
        model=base.name,
        revision=base.revision,
        method=prepared.method.summary(),
        identity=handle.identity(name).short,
        labels=spec.labels,
        before=start.before,
        after=after,
        majority=start.majority,
        probe=start.probe,
        num_trainable=counts.trained,
        num_head=counts.full,
        num_base=counts.base,
        seconds=outcome.seconds,
        tokens_per_s=outcome.tokens / max(outcome.seconds, 1e-9),
        peak_memory_bytes=memory,
        adapter_bytes=adapter_bytes or trained_bytes,
        num_train_rows=len(prepared.train),
        num_steps=outcome.steps,
        num_epochs=outcome.epochs,
        finished=not outcome.interrupted,
        choices=tuple(prepared.recipe.choices),
        samples=task.paired(start.answers, answers, asked),
        spectra=spectra(handle, name),
        notes=tuple([*prepared.notes, *outcome.notes, *early]),
        proof=proof,
        version=__version__,
    )
