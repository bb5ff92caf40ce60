"""The training loop: rows in order, steps, evaluations when they are due, checkpoints, and the best adapter so far.

It is a walk over :class:`Progress`: wherever a run was left, the same calls follow with the same numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch

from lorakit.adapters import Handle
from lorakit.records import Evaluation, Sample
from lorakit.training.allocator import keeping_freed_memory
from lorakit.training.data.batches import BatchOrder, Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.diary import Diary
from lorakit.training.keeper import Keeper, Snapshot
from lorakit.training.mode import training_mode
from lorakit.training.observe import Observer
from lorakit.training.plan import Outcome, Plan
from lorakit.training.prefix.cached import CachedPrefix
from lorakit.training.processes import Processes
from lorakit.training.randomness import PROCESS_STRIDE, Randomness, own_generators
from lorakit.training.signals import Interrupts, noticed
from lorakit.training.stepper import ALONE, Stepper
from lorakit.training.tasks import Task

SAVE_SECONDS = 600.0

Measure = Callable[[], tuple[Evaluation, Sequence[Sample]]]


def train(
    handle: Handle,
    name: str,
    task: Task,
    rows: Sequence[EncodedRow],
    collate: Collator,
    plan: Plan,
    observer: Observer,
    validate: Measure | None = None,
    keeper: Keeper | None = None,
    processes: Processes = ALONE,
    start: Snapshot | None = None,
    cached: CachedPrefix | None = None,
) -> Outcome:
    """Train the adapter ``name`` in place; the model is in evaluation mode afterwards.

    The first Ctrl-C (or SIGTERM) ends the run after the step at hand; a second one at once, as KeyboardInterrupt,
    with a checkpoint of the last whole step. The caller's random generators are left alone.

    Args:
        handle: the adapters on the model.
        name: which of them; it must be the one that acts.
        task: what is learned.
        rows: encoded training rows.
        collate: makes batches.
        plan: how long and how fast.
        observer: is told about every step.
        validate: measures the model, with a few samples, whenever an evaluation is due; called in the main process.
        keeper: takes lines of metrics and checkpoints.
        processes: which of how many processes this is.
        start: where to go on; the adapter has that snapshot's tensors.
        cached: what frozen blocks give for each row, kept on disk; None computes them in every pass.

    Raises:
        TrainingError: the run cannot go on: a loss or gradient that is not finite, no memory, a full disk.
    """
    loop = _Loop(handle, name, task, rows, collate, plan, observer, validate, keeper or Keeper(), processes, cached)
    seed = plan.seed + PROCESS_STRIDE * processes.rank
    mode = training_mode(handle.model, plan.grad_checkpointing, plan.recompute)
    kept = keeping_freed_memory(loop.stepper.device.type == "cpu" and not plan.recompute)
    with own_generators(loop.stepper.device, seed), noticed() as interrupts, mode, kept:
        if start is not None:
            loop.load(start)
        loop.run(interrupts)
    observer.training_ends()
    return loop.diary.outcome()


class _Loop:
    """One run of the loop."""

    def __init__(
        self,
        handle: Handle,
        name: str,
        task: Task,
        rows: Sequence[EncodedRow],
        collate: Collator,
        plan: Plan,
        observer: Observer,
        validate: Measure | None,
        keeper: Keeper,
        processes: Processes,
        cached: CachedPrefix | None,
    ) -> None:
        self.handle, self.name, self.rows, self.plan = handle, name, rows, plan
        self.validate, self.keeper, self.processes = validate, keeper, processes
        self.lengths = [task.size(row) for row in rows]
        per_epoch = len(BatchOrder(self.lengths, plan.batch_size, plan.seed))
        self.diary = Diary(plan, per_epoch, observer, keeper, task.goodness)
        self.stepper = Stepper(handle, name, task, collate, plan, processes, self._told, cached)
        self.order: tuple[int, list[list[int]]] | None = None
        self.boundary: Randomness | None = None
        self.saved: tuple[int, bool] = (0, False)
        self.saved_s = time.monotonic()

    def load(self, start: Snapshot) -> None:
        """Go on from a snapshot: progress, optimizer, generators and what the method remembers."""
        progress = start.progress
        self.diary.load(start)
        self.stepper.load(progress.step, progress.micro_batch, progress.halved, start.tensors, start.scaler)
        prefix = f"random/{self.processes.rank}/"
        own = {key.removeprefix(prefix): t for key, t in start.tensors.items() if key.startswith(prefix)}
        Randomness.from_tensors(own).restore(self.stepper.device)
        self.saved = progress.step, progress.unmeasured

    def run(self, interrupts: Interrupts) -> None:
        """Go on until the run is over or a signal has come."""
        self.boundary = Randomness.now(self.stepper.device)
        try:
            while self._goes_on(interrupts):
                self._step(interrupts)
        except KeyboardInterrupt:
            # The generators of the other processes cannot be asked for any more.
            if self.diary.progress.step and not self.processes.several:
                self._save()
            raise

    def _goes_on(self, interrupts: Interrupts) -> bool:
        """Do what is due between two steps; return whether another step follows."""
        progress = self.diary.progress
        waited = time.monotonic() - self.saved_s > SAVE_SECONDS
        stops, waited = self.processes.anywhere(interrupts.asked, waited, device=self.stepper.device)
        over = progress.step >= self.plan.num_steps
        measured = False
        if progress.unmeasured and (over or not stops):
            self._measure()
            measured = True
        ended = self.diary.ended
        every = self.plan.save_every
        due = progress.step % every == 0 if every else measured or waited
        if due or (measured and progress.best_step == progress.step) or stops or ended:
            with interrupts.held():
                self._save()
        return not (ended or stops)

    def _step(self, interrupts: Interrupts) -> None:
        begun = time.perf_counter()
        progress = self.diary.progress
        batches = self._batches(progress.epoch)
        numbers = batches[progress.batch]
        rows = [self.rows[i] for i in numbers]
        loss = self.stepper.gradients(rows)
        with interrupts.held():
            taken = self.stepper.settle(loss)
            progress.batch += 1
            if progress.batch == len(batches):
                progress.epoch, progress.batch = progress.epoch + 1, 0
            step = progress.step + 1
            due = progress.batch == 0 if self.plan.eval_every is None else step % self.plan.eval_every == 0
            progress.unmeasured = self.validate is not None and (due or step == self.plan.num_steps)
            progress.micro_batch, progress.halved = self.stepper.micro_batch, self.stepper.halved
            self.boundary = Randomness.now(self.stepper.device)
            tokens = sum(self.lengths[i] for i in numbers)
            self.diary.step(taken, [row.number for row in rows], tokens, time.perf_counter() - begun)

    def _measure(self) -> None:
        assert self.validate is not None
        found, samples = None, ()
        if self.processes.main:
            with own_generators(self.stepper.device):
                found, samples = self.validate()  # type: ignore[assignment]
        found = self.processes.from_main(Evaluation, found, self.stepper.device)
        settled = self.stepper.rule.settled()
        self.diary.evaluation(found, lambda: self.handle.state(self.name), samples, settled)

    def _save(self) -> None:
        """Hand over a snapshot, unless there is one of this very moment."""
        progress = self.diary.progress
        if not self.keeper.saves or self.saved == (progress.step, progress.unmeasured):
            return
        assert self.boundary is not None
        tensors = self.stepper.tensors()
        for name, tensor in self.boundary.tensors().items():
            for rank, own in enumerate(self._everyones(tensor)):
                tensors[f"random/{rank}/{name}"] = own
        scaler = self.stepper.scaler.state_dict()
        self.keeper.save(Snapshot(copy.deepcopy(progress), self.handle.state(self.name), tensors, scaler))
        self.saved, self.saved_s = (progress.step, progress.unmeasured), time.monotonic()

    def _everyones(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return a byte tensor of every process; they may be of unlike lengths."""
        if not self.processes.several:
            return [tensor]
        device = self.stepper.device
        sizes = [int(size) for size in self.processes.gathered(torch.tensor([len(tensor)]), device)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(tensor)] = tensor
        return [each[:size] for each, size in zip(self.processes.gathered(padded, device), sizes, strict=True)]

    def _told(self, name: str, text: str) -> None:
        self.diary.remark(name, text)
        if name == "memory":
            self.keeper.backed_off(self.stepper.count + 1)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the row numbers of an epoch's batches."""
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, list(BatchOrder(self.lengths, self.plan.batch_size, self.plan.seed, epoch))
        return self.order[1]
