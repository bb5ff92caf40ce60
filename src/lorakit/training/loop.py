"""The training loop: batches, gradients, steps, validation, and the best adapter so far.

It runs on Accelerate, so that the same lines serve one CPU, one GPU and several processes. A step's
loss is the mean over all its rows or supervised tokens, whatever the micro-batches and processes
(each token weighs the same). The first Ctrl-C ends the run after the step at hand.
"""

from __future__ import annotations

import contextlib
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
from lorakit.training.objectives import count_units, summed_loss
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
        fp16: scale the loss, as fp16 needs.
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
        best: the adapter with the lowest validation loss, and ``best_step`` where it was; None if not measured.
        interrupted: ended by Ctrl-C.
        metrics: lines for ``metrics.jsonl``.
    """

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    best: AdapterState | None = None
    best_step: int = 0
    best_loss: float = math.inf
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
    """Train the adapter ``name`` in place.

    Args:
        handle, name: which adapter; it must be the one that acts.
        rows: encoded training rows.
        collate: makes batches.
        plan: how long and how fast.
        observer: is told about every step.
        validate: measures the model; called at the end of every epoch and of the run.
        log: takes each line of metrics as it comes.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=next(handle.model.parameters()).device.type == "cpu", mixed_precision="fp16" if plan.fp16 else "no"
    )
    optimizer = optimizer_for(handle, name, plan)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, plan.num_steps))
    model, optimizer = accelerator.prepare(handle.model, optimizer)
    run = _Run(handle, name, model, optimizer, accelerator, plan)
    outcome = Outcome()
    entry, updates = handle.entry(name), handle.updates(name)
    lengths = [len(row.input_ids) for row in rows]
    per_epoch = math.ceil(len(rows) / plan.batch_size)
    model.train()
    with _stop_on_interrupt() as stopped:
        epoch = 0
        while outcome.steps < plan.num_steps and not stopped.is_set():
            for numbers in BatchOrder(lengths, plan.batch_size, plan.seed, epoch):
                start = time.perf_counter()
                loss, norm = run.step([collate([rows[i] for i in part]) for part in _parts(numbers, plan.micro_batch)])
                entry.method.after_step(updates, outcome.steps)
                rate = float(optimizer.param_groups[0]["lr"])
                rates.step()
                outcome.steps += 1
                outcome.seconds += time.perf_counter() - start
                outcome.tokens += sum(lengths[i] for i in numbers)
                outcome.epochs = outcome.steps / per_epoch
                _tell(outcome, plan, loss, norm, rate, observer, log)
                if outcome.steps >= plan.num_steps or stopped.is_set():
                    break
            epoch += 1
            ended = outcome.steps >= plan.num_steps
            if validate is not None and not stopped.is_set() and (ended or outcome.steps == epoch * per_epoch):
                _validate(handle, name, outcome, validate, observer, log)
                model.train()
        outcome.interrupted = stopped.is_set() and outcome.steps < plan.num_steps
    model.eval()
    observer.training_ends()
    return outcome


class _Run:
    """One optimizer step over micro-batches."""

    def __init__(
        self, handle: Handle, name: str, model: nn.Module, optimizer: Any, accelerator: Any, plan: Plan
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.plan = plan
        self.method = handle.entry(name).method
        self.updates = handle.updates(name)
        self.parameters = list(handle.parameters(name).values())
        self.count = 0

    def step(self, batches: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
        """Take one step; return the mean loss and the gradient norm before clipping."""
        device = self.accelerator.device
        units = sum(count_units(self.model, batch) for batch in batches)
        everywhere = int(self.accelerator.reduce(torch.tensor(units, device=device), reduction="sum"))
        processes = self.accelerator.num_processes
        total = 0.0
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, _ = summed_loss(self.model, {k: v.to(device) for k, v in batch.items()})
                loss = loss * (processes / max(everywhere, 1))
                if last and (penalty := self.method.penalty(self.updates)) is not None:
                    loss = loss + penalty
                self.accelerator.backward(loss)
                total += float(loss.detach())
        self.count += 1
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss is {total} at step {self.count}. Likely causes: a learning rate that is too high "
                f"({self.plan.lr:g} here), or fp16 overflow. Try a tenth of it, or dtype 'fp32'."
            )
        self.method.before_step(self.updates, self.count)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.plan.clip_norm))
        if not math.isfinite(norm) and not self.plan.fp16:
            raise TrainingError(f"the gradient is {norm} at step {self.count}. Try a lower learning rate, or dtype 'fp32'.")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm


def _tell(
    outcome: Outcome,
    plan: Plan,
    loss: float,
    norm: float,
    rate: float,
    observer: Observer,
    log: Callable[[dict[str, Any]], None] | None,
) -> None:
    speed = outcome.tokens / max(outcome.seconds, 1e-9)
    step = Step(outcome.steps, plan.num_steps, outcome.epochs, loss, rate, norm, speed, outcome.seconds)
    observer.step(step)
    line = {"kind": "train", **{key: value for key, value in vars(step).items() if key != "num_steps"}}
    outcome.metrics.append(line)
    if log is not None:
        log(line)


def _validate(
    handle: Handle,
    name: str,
    outcome: Outcome,
    validate: Callable[[], Evaluation],
    observer: Observer,
    log: Callable[[dict[str, Any]], None] | None,
) -> None:
    found = validate()
    best = found.loss < outcome.best_loss
    if best:
        outcome.best, outcome.best_step, outcome.best_loss = handle.state(name), outcome.steps, found.loss
    observer.evaluation(outcome.steps, outcome.epochs, found, best)
    line = {
        "kind": "eval",
        "step": outcome.steps,
        "epoch": outcome.epochs,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "perplexity": found.perplexity,
    }
    outcome.metrics.append(line)
    if log is not None:
        log(line)


def _parts(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Let the first Ctrl-C (or SIGTERM) set an event, a second one interrupt at once."""
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
            signal.signal(number, handler)
