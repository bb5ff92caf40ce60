"""``fit``: fine-tune a pretrained model on rows, prove what happened, and leave a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapters import AdapterState, Handle, attach
from lorakit.adapters.spectrum import spectra
from lorakit.bases import Base
from lorakit.errors import ConfigError, TrainingError
from lorakit.files import is_disk_full
from lorakit.records import Evaluation, RunSummary
from lorakit.training import baselines, recipe, samples
from lorakit.training.config import TrainConfig
from lorakit.training.data.encode import EncodedRow
from lorakit.training.loop import Outcome, Plan, train
from lorakit.training.memory import peak_bytes
from lorakit.training.objectives import evaluate, summed_loss
from lorakit.training.observe import Observer
from lorakit.training.prepare import Prepared, Rows, prepare, resolved
from lorakit.training.proof import Reference, prove, take_reference
from lorakit.training.run_folder import RunFolder
from lorakit.training.spec import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "default"


@dataclass
class FitResult:
    """A finished run, ready to use.

    Attributes:
        model: the adapted model, the adapter acting.
        tokenizer: its tokenizer.
        handle: the adapters on it.
        spec: the task.
        summary: what was measured.
        folder: the run folder, or None if none was asked for.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    handle: Handle
    spec: TaskSpec
    summary: RunSummary
    folder: Path | None


@dataclass(frozen=True)
class _Before:
    """What was measured before any step."""

    reference: Reference
    evaluation: Evaluation
    majority: Evaluation | None
    probe: Evaluation | None
    asked: tuple[EncodedRow, ...]
    answers: samples.Answers


def fit(
    model: str | Path | nn.Module,
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    observer: Observer | None = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> FitResult:
    """Fine-tune ``model`` on ``rows``.

    Args:
        model: a folder or hub name, or a transformers model (adapted in place; then give its tokenizer).
        rows: a file or folder of examples, or dictionaries: ``text`` and ``label``, ``prompt`` and
            ``completion``, ``instruction`` and ``output``, ``messages``, or ``text``.
        tokenizer: the tokenizer of a model object.
        observer: is told how the run goes.
        config: settings as a value or a mapping; ``settings`` says more of them by keyword. See
            :class:`TrainConfig`; what nobody sets is chosen, and the summary says why.
        settings: settings by keyword, such as ``rank=16`` or ``output="runs/mine"``.

    Returns:
        The adapted model with its summary; with ``output`` also a run folder.

    Raises:
        InputError: something asked for cannot be done; nothing has been written then.
        TrainingError: the run broke, or the disk is full.

    After an error a model object that was given is as before, without the adapter.
    """
    given = config.model_dump() if isinstance(config, TrainConfig) else dict(config or {})
    twice = sorted(set(given) & set(settings)) if not isinstance(config, TrainConfig) else []
    if twice:
        raise ConfigError(f"set twice, in config and by keyword: {', '.join(twice)}.")
    decided = TrainConfig(**{**given, **settings})
    watcher = observer or Observer()
    folder = RunFolder(decided.output, decided.force) if decided.output is not None else None
    prepared = prepare(model, rows, decided, tokenizer, watcher)
    watcher.stage("attaching the adapter")
    collate = prepared.spec.collator(prepared.base.tokenizer)
    reference = take_reference(prepared.base.model, prepared.held, collate)
    handle = _attach(prepared, decided)
    try:
        return _run(prepared, decided, handle, reference, watcher, folder)
    except BaseException:  # a model that was given is what it was
        handle.detach()
        raise
    finally:
        if folder is not None:
            folder.end()


def _run(
    prepared: Prepared,
    config: TrainConfig,
    handle: Handle,
    reference: Reference,
    observer: Observer,
    folder: RunFolder | None,
) -> FitResult:
    base, spec = prepared.base, prepared.spec
    recipe.say_method(
        config, prepared.recipe, prepared.method, list(handle.entry(ADAPTER).targets), str(handle.coverage(ADAPTER))
    )
    observer.choices(prepared.recipe.choices)
    for note in prepared.notes:
        observer.note(note)
    before = _measure_before(prepared, handle, reference, observer)
    if folder is not None:
        folder.begin(resolved(config, prepared))
    memory = _memory(prepared, handle)
    observer.stage("training")
    try:
        outcome = _train(prepared, config, handle, observer, folder)
    except TrainingError as error:
        if folder is None or error.__cause__ is None or not is_disk_full(error.__cause__):
            raise
        place = folder.save_adapter(_named(handle, base), spec, base.revision)
        raise TrainingError(f"{error} The adapter so far was saved whole in '{place}'.") from error
    if outcome.best is not None and not outcome.interrupted and outcome.best_step != outcome.steps:
        handle.set_state(outcome.best, ADAPTER)
        prepared.notes.append(f"Kept the adapter of step {outcome.best_step:,}, the best on the validation rows.")
        observer.note(prepared.notes[-1])
    if folder is not None:
        observer.stage("saving the adapter")
        folder.save_adapter(_named(handle, base), spec, base.revision)
    summary = _summarise(prepared, handle, before, outcome, memory, observer, folder)
    if folder is not None:
        folder.finish(summary, base.tokenizer.chat_template if isinstance(base.tokenizer.chat_template, str) else None)
    return FitResult(base.model, base.tokenizer, handle, spec, summary, folder.path if folder is not None else None)


def _attach(prepared: Prepared, config: TrainConfig) -> Handle:
    base = prepared.base
    extra = [config.train_modules] if isinstance(config.train_modules, str) else list(config.train_modules)
    heads = list(base.new_modules) or (["head"] if prepared.spec.labels else [])
    return attach(
        base.model,
        prepared.method,
        config.targets,
        name=ADAPTER,
        exclude=config.exclude,
        layers=config.layers,
        train_modules=[*heads, *(name for name in extra if name not in heads)],
        new_modules=base.new_modules,
        seed=config.seed,
    )


def _measure_before(prepared: Prepared, handle: Handle, reference: Reference, observer: Observer) -> _Before:
    base, spec = prepared.base, prepared.spec
    collate = spec.collator(base.tokenizer)
    majority = probe = None
    with handle.disabled():
        observer.stage("measuring the base")
        evaluation = evaluate(base.model, prepared.held, collate, spec.labels)
        if spec.labels:
            majority = baselines.majority(prepared.train, prepared.held, spec.labels)
            observer.stage("fitting a linear probe on the frozen base")
            probe = baselines.linear_probe(base.model, prepared.train, prepared.held, collate, spec.labels)
        asked = samples.questions(base.tokenizer, spec, prepared.held)
        answers = samples.answer(base.model, base.tokenizer, spec, asked)
    return _Before(reference, evaluation, majority, probe, asked, answers)


def _memory(prepared: Prepared, handle: Handle) -> int:
    """Return the tensor bytes of a step on the longest micro-batch, of the adapter itself and of AdamW's state."""
    model, spec = prepared.base.model, prepared.spec
    longest = sorted(prepared.train, key=lambda row: -len(row.input_ids))[: prepared.recipe.micro_batch]
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in spec.collator(prepared.base.tokenizer)(longest).items()}
    parameters = list(handle.parameters(ADAPTER).values())

    def step() -> None:
        loss, count = summed_loss(model, batch)
        (loss / max(count, 1)).backward()  # type: ignore[no-untyped-call]

    with _own_generators(device):
        model.train()
        peak = peak_bytes(step, device)
        model.train(False)
    for parameter in parameters:
        parameter.grad = None
    # The adapter itself, and AdamW's two moments; the gradients are among what the step has made.
    return peak + sum(3 * parameter.numel() * parameter.element_size() for parameter in parameters)


def _own_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within the block torch's generators may be drawn from and seeded; the caller's state comes back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _train(
    prepared: Prepared, config: TrainConfig, handle: Handle, observer: Observer, folder: RunFolder | None
) -> Outcome:
    recipe, spec, base = prepared.recipe, prepared.spec, prepared.base
    collate = spec.collator(base.tokenizer)
    plan = Plan(
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        lr=recipe.lr,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
        fp16=recipe.dtype == "fp16",
    )
    with _own_generators(next(base.model.parameters()).device):
        torch.manual_seed(config.seed)
        return train(
            handle,
            ADAPTER,
            prepared.train,
            collate,
            plan,
            observer,
            validate=lambda: evaluate(base.model, prepared.held, collate, spec.labels),
            log=folder.log if folder is not None else None,
        )


def _summarise(
    prepared: Prepared,
    handle: Handle,
    before: _Before,
    outcome: Outcome,
    memory: int,
    observer: Observer,
    folder: RunFolder | None,
) -> RunSummary:
    from lorakit.version import __version__

    base, spec = prepared.base, prepared.spec
    collate = spec.collator(base.tokenizer)
    observer.stage("measuring the adapted model")
    after = evaluate(base.model, prepared.held, collate, spec.labels)
    answers = samples.answer(base.model, base.tokenizer, spec, before.asked)
    observer.stage("proving that the base is untouched and that merging changes nothing")
    proof = prove(handle, before.reference, prepared.held, collate)
    counts = handle.counts(ADAPTER)
    size = (folder.path / "adapter_model.safetensors").stat().st_size if folder is not None else 0
    trained_bytes = sum(p.numel() * p.element_size() for p in handle.parameters(ADAPTER).values())
    return RunSummary(
        task=spec.task,
        model=base.name,
        revision=base.revision,
        method=prepared.method.summary(),
        identity=handle.identity(ADAPTER).short,
        labels=spec.labels,
        before=before.evaluation,
        after=after,
        majority=before.majority,
        probe=before.probe,
        num_trainable=counts.trained,
        num_head=counts.full,
        num_base=counts.base,
        seconds=outcome.seconds,
        tokens_per_s=outcome.tokens / max(outcome.seconds, 1e-9),
        peak_memory_bytes=memory,
        adapter_bytes=size or trained_bytes,
        num_train_rows=len(prepared.train),
        num_steps=outcome.steps,
        num_epochs=outcome.epochs,
        finished=not outcome.interrupted,
        choices=tuple(prepared.recipe.choices),
        samples=samples.paired(before.answers, answers, before.asked, spec),
        spectra=spectra(handle, ADAPTER),
        notes=tuple(prepared.notes),
        proof=proof,
        version=__version__,
    )


def _named(handle: Handle, base: Base) -> AdapterState:
    # A run folder is used from anywhere: a relative place would be another one there.
    folder = Path(base.name).expanduser()
    name = str(folder.absolute()) if folder.is_dir() else base.name
    return dataclasses.replace(handle.state(ADAPTER), base_name=name)
