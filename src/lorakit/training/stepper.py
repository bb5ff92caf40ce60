"""One optimizer step over one or more micro-batches, in one or more processes.

A step's loss is the mean over all its rows or supervised tokens, whatever the micro-batches and the processes: each
token weighs the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorakit.adapters import Handle
from lorakit.errors import TrainingError
from lorakit.training import diagnosis
from lorakit.training.compiling import COMPILING, CompiledBlocks, shown
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.optimizers import load_state_tensors, optimizer_for, state_tensors
from lorakit.training.packing import batching_of
from lorakit.training.plan import Plan
from lorakit.training.prefix.cached import CachedPrefix
from lorakit.training.processes import Processes
from lorakit.training.randomness import Randomness
from lorakit.training.tasks import Task
from lorakit.training.tasks.shortcuts import NONE, Shortcuts, explained
from lorakit.training.trial import show_readers

ALONE = Processes()


@dataclass(frozen=True)
class Taken:
    """One optimizer step: mean loss in nats, the gradient's norm before clipping, the first group's rate."""

    loss: float
    norm: float
    rate: float


class Stepper:
    """Takes optimizer steps.

    Attributes:
        count: steps taken.
        micro_batch: rows at a time; ``halved`` if that is half of the plan's, because memory ran out.
        shortcuts: what the loss's forward pass leaves out; None until the first step has tried it.
    """

    def __init__(
        self,
        handle: Handle,
        name: str,
        task: Task,
        collate: Collator,
        plan: Plan,
        processes: Processes = ALONE,
        told: Callable[[str, str], None] = lambda name, text: None,
        cached: CachedPrefix | None = None,
    ) -> None:
        self.plan, self.task, self.collate, self.processes, self.told = plan, task, collate, processes, told
        self.handle, self.name, self.batching = handle, name, batching_of(collate, plan.packing, handle.model)
        self.rule = handle.entry(name).method.rule(handle.updates(name), plan.num_steps)
        self.named = handle.parameters(name)
        self.parameters = list(self.named.values())
        self.device = next(handle.model.parameters()).device
        self.model, self.compiled = handle.model, CompiledBlocks(handle.model) if plan.compile else None
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.dtype == "fp16")
        self.count, self.cached = 0, cached
        self.micro_batch, self.halved = plan.micro_batch, False
        self.shortcuts: Shortcuts | None = None
        self._numbers: tuple[int, ...] = ()
        frozen = [buffer for update in handle.updates(name).values() for buffer in update.buffers()]
        processes.same([*(parameter.data for parameter in self.parameters), *frozen])

    def step(self, rows: Sequence[EncodedRow]) -> Taken:
        """Take one step on the mean loss over all units of ``rows``.

        Raises:
            TrainingError: the loss or the gradient is not finite, or memory ran out; the parameters are as before.
        """
        return self.settle(self.gradients(rows))

    def gradients(self, rows: Sequence[EncodedRow]) -> float:
        """Compute the gradients of the next step and return its mean loss; no parameter changes.

        Where memory runs out, the micro-batches are halved, once in a run, and the step begins again from the same
        random numbers.

        Raises:
            TrainingError: as for :meth:`step`.
        """
        self._numbers = tuple(row.number for row in rows)
        if self.count + 1 == self.plan.halve_micro_at and not self.halved:
            self._halve()
            if self.count:
                text = f"micro_batch is {self.micro_batch:,} from step {self.count + 1:,} on: memory ran out there."
                self.told("memory", text)
        if self.shortcuts is None:
            self._take_shortcuts(rows)
            show_readers(self.handle, self.task, self.collate, rows, self.parameters)
            if self.compiled is not None:
                self.told("compile", COMPILING)
                self.compiled.try_out(self._loss, shown(rows, self.task), self.parameters, self.device)
        before = Randomness.now(self.device)
        total, problem = self._tried(rows)
        while any(self.processes.anywhere(problem is not None, device=self.device)):
            self._back_off(rows, problem)
            before.restore(self.device)
            total, problem = self._tried(rows)
        loss = float(self.processes.add(total))
        self._stop_if(diagnosis.broken_loss(loss, self.count + 1, self._numbers, self.plan.setting))
        return loss

    def settle(self, loss: float) -> Taken:
        """Take the step whose gradients have been computed.

        Raises:
            TrainingError: as for :meth:`step`.
        """
        step = self.count + 1
        factor = self.plan.rates(self.count)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor * _rise(group, self.count)
        self.processes.add_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        self.rule.before_step(step)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.plan.clip_norm))
        # With fp16 an overflow is expected now and then: the scaler leaves that step out and scales less.
        self._stop_if(diagnosis.broken_gradient(norm, step, self._numbers, self.plan.setting))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.rule.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        self._follow()
        for remark in self.rule.remarks():
            self.told(f"method at step {step}", remark)
        self.count = step
        return Taken(loss, norm, float(self.optimizer.param_groups[0]["lr"]))

    def tensors(self) -> dict[str, Tensor]:
        """Return what the optimizer and the method remember: copies on the CPU."""
        found = {f"optimizer/{key}": tensor for key, tensor in state_tensors(self.optimizer, self.named).items()}
        of_method = self.rule.state().items()
        return found | {f"method/{key}": tensor.detach().to("cpu", copy=True) for key, tensor in of_method}

    def load(self, count: int, micro_batch: int, halved: bool, tensors: Mapping[str, Tensor], scaler: Any) -> None:
        """Go on from ``count`` steps with what :meth:`tensors` returned and the scaler's numbers."""
        self.count, self.micro_batch, self.halved = count, micro_batch, halved
        self.rule.load(_under("method/", tensors))
        self._follow()
        load_state_tensors(self.optimizer, self.named, _under("optimizer/", tensors))
        if scaler:
            self.scaler.load_state_dict(dict(scaler))

    def _optimizer(self) -> Optimizer:
        return optimizer_for(self.rule, self.named, self.plan.optimizer, self.plan.lr, self.plan.weight_decay)

    def _follow(self) -> None:
        """Take up the adapter's parameters as they are now; what is remembered of those that stayed is kept."""
        now = self.handle.parameters(self.name)
        if [id(parameter) for parameter in now.values()] == [id(parameter) for parameter in self.parameters]:
            return
        remembered = self.optimizer.state
        self.named, self.parameters = now, list(now.values())
        self.optimizer = self._optimizer()
        self.optimizer.state.update({p: remembered[p] for p in self.parameters if p in remembered})
        self.optimizer.state.update(self.rule.carry(remembered))

    def _take_shortcuts(self, rows: Sequence[EncodedRow]) -> None:
        self.shortcuts = self.task.shortcuts(self.model, self.collate, rows)
        if (missed := explained(self.shortcuts, self.task.possible_shortcuts(self.model))) is not None:
            self.told("shortcuts", missed)

    def _tried(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, str | None]:
        """Add up the gradients of this process's share; return its part of the loss, and the problem if memory ends."""
        try:
            with contextlib.nullcontext() if self.compiled is None else self.compiled.running():
                return self._backward(rows), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]  # the error itself holds the activations
        self._forget()
        return torch.zeros((), dtype=torch.float64, device=self.device), problem

    def _loss(self, rows: Sequence[EncodedRow]) -> Tensor:
        batch = {key: value.to(self.device) for key, value in self.batching(rows).items()}
        with contextlib.nullcontext() if self.cached is None else self.cached.skipped(rows, batch):
            return self.task.loss(self.model, batch, self.shortcuts or NONE)

    def _backward(self, rows: Sequence[EncodedRow]) -> Tensor:
        units = max(1, sum(self.task.units(row) for row in rows))
        parts = _parts(rows, self.micro_batch, self.processes)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, part in enumerate(parts):
            loss = self._loss(part) / units
            if not loss.requires_grad:
                raise TrainingError(diagnosis.unreached().text)
            if self.processes.main and i == len(parts) - 1:
                penalty = self.rule.penalty()
                loss = loss if penalty is None else loss + penalty
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _back_off(self, rows: Sequence[EncodedRow], problem: str | None) -> None:
        """Halve the micro-batches, or raise where that has been done, or cannot be.

        Raises:
            TrainingError: there is nothing left to halve.
        """
        longest = max(self.task.size(row) for row in rows)
        where = f"in step {self.count + 1:,} ({diagnosis.named(self._numbers)}, up to {longest:,} tokens)"
        found = f" ({problem})" if problem else " in another process"
        if self.halved or self.micro_batch == 1:
            tried = "at a micro-batch of 1" if self.micro_batch == 1 else "again, with half the micro-batch"
            raise TrainingError(out_of_memory(f"{where} {tried}{found}"))
        self._forget()
        before = self.micro_batch
        self._halve()
        self.told(
            "memory",
            f"memory ran out {where}{found}: micro_batch {before:,} is now {self.micro_batch:,}, and the step is taken "
            "again.",
        )

    def _halve(self) -> None:
        self.micro_batch, self.halved = max(1, self.micro_batch // 2), True

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stop_if(self, finding: diagnosis.Finding | None) -> None:
        if finding is not None:
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(finding.text)


def _parts(rows: Sequence[EncodedRow], micro_batch: int, processes: Processes) -> Sequence[Sequence[EncodedRow]]:
    """Return this process's micro-batches of a step; with several processes none should be left without rows."""
    size = min(micro_batch, -(-len(rows) // processes.count))
    return processes.share([rows[start : start + size] for start in range(0, len(rows), size)])


def _rise(group: Mapping[str, Any], count: int) -> float:
    """Return the share of its rate that a group has reached that came to be in the middle of a run."""
    warmup = group.get("warmup", 0)
    return min(1.0, (count - group.get("born", 0) + 1) / warmup) if warmup else 1.0


def out_of_memory(where: str) -> str:
    """Return what to tell where there is nothing left to halve."""
    return (
        f"memory ran out {where}. Give a smaller micro_batch or max_length, grad_checkpointing, dtype 'bf16', or a "
        "machine with more memory."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out, on a GPU or on a CPU."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
