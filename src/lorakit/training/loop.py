"""The training loop: batches, gradients, steps, validation, and the best adapter so far.

A step's loss is the mean over all its rows or supervised tokens, whatever the micro-batches and the
processes: each token weighs the same. The first Ctrl-C ends the run after the step at hand.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import AdapterState, Handle
from lorakit.errors import TrainingError
from lorakit.records import Evaluation
from lorakit.training.data.batches import BatchOrder, Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.objectives import count_units, goodness, summed_loss
from lorakit.training.observe import Observer, Step

WARMUP_SHARE = 0.06


@dataclass(frozen=True)
class Plan:
    """What the loop needs to know.

    Attributes:
        num_steps: optimizer steps.
        batch_size: rows per step; ``micro_batch`` of them at a time in memory.
        lr, weight_decay, clip_norm: of AdamW.
        seed: of the order of the rows.
        fp16: scale the loss, so that small gradients survive in an fp16 base's activations.
    """

    num_steps: int
    batch_size: int
    micro_batch: int
    lr: float
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    fp16: bool = False


@dataclass
class Outcome:
    """What the loop did.

    Attributes:
        steps: optimizer steps taken; ``epochs`` passes over the rows.
        seconds, tokens: training time without validation, and input tokens in it.
        best: the adapter that was best on the validation rows, ``best_step`` where it was, and ``best_measure`` what
            was measured there; None if nothing was measured.
        interrupted: ended by Ctrl-C.
        metrics: lines for ``metrics.jsonl``.
    """

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    best: AdapterState | None = None
    best_step: int = 0
    best_measure: Evaluation | None = None
    interrupted: bool = False
    metrics: list[dict[str, Any]] = field(default_factory=list)


def schedule(step: int, num_steps: int) -> float:
    """Return the factor on the learning rate at ``step`` (from 0): a linear warm-up, then linear to 0."""
    warmup = max(1, math.ceil(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup))


def optimizer_for(handle: Handle, name: str, plan: Plan) -> torch.optim.AdamW:
    """Return AdamW over the adapter's parameters, in the groups that its method asks for."""
    entry = handle.entry(name)
    groups = entry.method.param_groups(handle.parameters(name), plan.lr)
    return torch.optim.AdamW(groups, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)


def train(
    handle: Handle,
    name: str,
    rows: Sequence[EncodedRow],
    collate: Collator,
    plan: Plan,
    observer: Observer,
    validate: Callable[[], Evaluation] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Train the adapter ``name`` in place; the model is in evaluation mode afterwards.

    Args:
        handle: the adapters on the model.
        name: which of them; it must be the one that acts.
        rows: encoded training rows.
        collate: makes batches.
        plan: how long and how fast.
        observer: is told about every step.
        validate: measures the model; called at the end of every epoch and of the run.
        log: takes each line of metrics as it comes.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    stepper = Stepper(handle, name, plan)
    diary = _Diary(handle, name, plan.num_steps, math.ceil(len(rows) / plan.batch_size), observer, log)
    outcome = diary.outcome
    lengths = [len(row.input_ids) for row in rows]
    with _stop_on_interrupt() as stopped, _training(handle):
        for epoch in itertools.count():
            for numbers in BatchOrder(lengths, plan.batch_size, plan.seed, epoch):
                start = time.perf_counter()
                parts = _parts(numbers, plan.micro_batch)
                taken = stepper.step([collate([rows[i] for i in part]) for part in parts])
                diary.step(taken, sum(lengths[i] for i in numbers), time.perf_counter() - start)
                if diary.ended or stopped.is_set():
                    break
            if validate is not None and (diary.ended or not stopped.is_set()):
                diary.evaluation(validate())
            if diary.ended or stopped.is_set():
                break
    outcome.interrupted = not diary.ended
    observer.training_ends()
    return outcome


@dataclass(frozen=True)
class Taken:
    """One optimizer step: mean loss in nats, the gradient's norm before clipping, the first group's rate."""

    loss: float
    norm: float
    rate: float


class Stepper:
    """Takes optimizer steps, each over one or more micro-batches."""

    def __init__(self, handle: Handle, name: str, plan: Plan) -> None:
        from accelerate import Accelerator

        self.plan = plan
        self.method = handle.entry(name).method
        self.updates = handle.updates(name)
        self.parameters = list(handle.parameters(name).values())
        self.device = next(handle.model.parameters()).device
        # The model stays where it is and as it is: no device, dtype or forward is changed for it.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        alone = self.accelerator.num_processes == 1
        self.model: nn.Module = handle.model if alone else self.accelerator.prepare_model(handle.model)
        self.optimizer = optimizer_for(handle, name, plan)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.fp16)
        self.count = 0

    def step(self, batches: Sequence[dict[str, Tensor]]) -> Taken:
        """Take one step on the mean loss over all the batches' rows or supervised tokens.

        Raises:
            TrainingError: the loss or the gradient is not finite; the parameters are as before.
        """
        self.count += 1
        factor = schedule(self.count - 1, self.plan.num_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        loss = self._backward(batches)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.count}. Likely causes: a learning rate that is too high "
                f"({self.plan.lr:g} here), or fp16 overflow. Try a tenth of it, or dtype 'fp32'."
            )
        self.scaler.unscale_(self.optimizer)
        self.method.before_step(self.updates, self.count)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.plan.clip_norm))
        # With fp16 an overflow is expected now and then: the scaler leaves that step out and scales less.
        if not math.isfinite(norm) and not self.plan.fp16:
            raise TrainingError(
                f"the gradient is {norm} at step {self.count}. Try a lower learning rate than {self.plan.lr:g}, "
                "or dtype 'fp32'."
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.updates, self.count)
        return Taken(loss, norm, float(self.optimizer.param_groups[0]["lr"]))

    def _backward(self, batches: Sequence[dict[str, Tensor]]) -> float:
        """Add up the gradients of all batches and return their mean loss, penalty included."""
        units = torch.tensor(sum(count_units(self.model, batch) for batch in batches), device=self.device)
        everywhere = max(1, int(self.accelerator.reduce(units, reduction="sum")))
        total = 0.0
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, _ = summed_loss(self.model, {k: v.to(self.device) for k, v in batch.items()})
                # Gradients of several processes are averaged, so each counts as many times as there are.
                loss = loss * (self.accelerator.num_processes / everywhere)
                if last and (penalty := self.method.penalty(self.updates)) is not None:
                    loss = loss + penalty
                self.accelerator.backward(self.scaler.scale(loss))
                total += float(loss.detach())
        return total


class _Diary:
    """Keeps the outcome while the run goes on, and tells it to whoever watches."""

    def __init__(
        self,
        handle: Handle,
        name: str,
        num_steps: int,
        per_epoch: int,
        observer: Observer,
        log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.outcome = Outcome()
        self.handle = handle
        self.name = name
        self.num_steps = num_steps
        self.per_epoch = per_epoch
        self.observer = observer
        self.log = log

    @property
    def ended(self) -> bool:
        """Whether the last step of the plan is done."""
        return self.outcome.steps >= self.num_steps

    def step(self, taken: Taken, tokens: int, seconds: float) -> None:
        """Note a step, its input tokens and its time."""
        outcome = self.outcome
        outcome.steps += 1
        outcome.epochs = outcome.steps / self.per_epoch
        outcome.tokens += tokens
        outcome.seconds += seconds
        speed = outcome.tokens / max(outcome.seconds, 1e-9)
        step = Step(
            outcome.steps,
            self.num_steps,
            outcome.epochs,
            taken.loss,
            taken.rate,
            taken.norm,
            speed,
            outcome.seconds,
        )
        self.observer.step(step)
        self._write({"kind": "train", **{key: value for key, value in vars(step).items() if key != "num_steps"}})

    def evaluation(self, found: Evaluation) -> None:
        """Note what was measured, and keep the adapter if none was better.

        Raises:
            TrainingError: the loss is not finite.
        """
        outcome = self.outcome
        if not math.isfinite(found.loss):
            raise TrainingError(
                f"the loss on the validation rows is {found.loss} after step {outcome.steps}: the adapter has grown "
                "beyond all bounds. Try a tenth of the learning rate."
            )
        best = outcome.best_measure is None or goodness(found) > goodness(outcome.best_measure)
        if best:
            outcome.best, outcome.best_step = self.handle.state(self.name), outcome.steps
            outcome.best_measure = found
        self.observer.evaluation(outcome.steps, outcome.epochs, found, best)
        self._write(
            {
                "kind": "eval",
                "step": outcome.steps,
                "epoch": outcome.epochs,
                "loss": found.loss,
                "accuracy": found.accuracy,
                "perplexity": found.perplexity,
            }
        )

    def _write(self, line: dict[str, Any]) -> None:
        self.outcome.metrics.append(line)
        if self.log is not None:
            self.log(line)


def _parts(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


@contextlib.contextmanager
def _training(handle: Handle) -> Iterator[None]:
    """Put the model in training mode, and in evaluation mode afterwards, whatever happens."""
    handle.model.train()
    try:
        yield
    finally:
        handle.model.eval()


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C (or SIGTERM) set an event, a second one interrupt at once.

    Only the main thread hears of signals; in another one the event stays unset.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(signum: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
