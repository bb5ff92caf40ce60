"""Several processes train one adapter, as ``torchrun`` and ``accelerate launch`` start them.

Each computes the gradients of its share of a step's rows; the sums are added up, so that every process takes the
same optimizer step. Only the main one measures, writes and shows. Nothing waits for a share that is empty.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lorakit.errors import ConfigError, TrainingError
from lorakit.records import from_json, to_json

R = TypeVar("R")

# The others wait while the main process measures; a process that has died is noticed by the launcher.
PATIENCE = datetime.timedelta(days=1)

_TORCH = "WORLD_SIZE", "RANK"
_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")
_MEETING = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them.

    Attributes:
        count: how many there are; ``rank`` which one this is, the main one being 0.
    """

    count: int = 1
    rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that measures, writes and shows."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, parts: Sequence[R]) -> Sequence[R]:
        """Return this process's share of a step's micro-batches; it may be empty."""
        return parts[self.rank :: self.count]

    def add(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place; the same bits in each of them."""
        if self.several:
            _talked(lambda: dist.all_reduce(values))
        return values

    def anywhere(self, *flags: bool, device: torch.device) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process."""
        if not self.several:
            return flags
        return tuple(bool(count) for count in self.add(torch.tensor([int(f) for f in flags], device=device)).tolist())

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients over all processes; where one has none it counts as zero."""
        if not self.several:
            return
        # In one message: an adapter's tensors are many and small.
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters])
        self.add(flat)
        start = 0
        for parameter in parameters:
            part = flat[start : start + parameter.numel()]
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)
            start += parameter.numel()

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.several:
            _talked(lambda: [dist.broadcast(tensor, 0) for tensor in tensors])

    def from_main(self, kind: type[R], found: R | None, device: torch.device) -> R:
        """Return the main process's record in every process; the others give None."""
        if not self.several:
            assert found is not None
            return found
        import json

        raw = json.dumps(to_json(found)).encode() if self.main else b""
        size = self.add(torch.tensor([len(raw)], device=device))
        data = torch.zeros(int(size), dtype=torch.uint8, device=device)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        self.same([data])
        return from_json(kind, json.loads(bytes(data.tolist())))

    def gathered(self, tensor: Tensor, device: torch.device) -> list[Tensor]:
        """Return the tensor of every process, in the order of their ranks, on the CPU; they must be of one size."""
        if not self.several:
            return [tensor]
        mine = tensor.to(device)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        _talked(lambda: dist.all_gather(found, mine))
        return [each.cpu() for each in found]


def started() -> Processes:
    """Return what the launcher's environment says.

    Raises:
        ConfigError: it makes no sense, or the launcher was asked for several processes and has started one.
    """
    size, rank = _words()
    if size not in os.environ and all(name in os.environ for name in ("ACCELERATE_USE_CPU", *_MEETING)):
        raise ConfigError(
            "accelerate launch was asked for several processes, but on CPUs it starts only this one unless it goes "
            "through mpirun. Start with: torchrun --nproc-per-node N -m lorakit train ... For one process, give "
            "accelerate --num_processes 1 and unset MASTER_ADDR."
        )
    try:
        return Processes(int(os.environ.get(size, "1")), int(os.environ.get(rank, "0")))
    except ValueError:
        raise ConfigError(
            f"{size}={os.environ.get(size)!r} and {rank}={os.environ.get(rank)!r} do not say which of how "
            "many processes this is. Start with torchrun, or unset them."
        ) from None


def _words() -> tuple[str, str]:
    """Return the variables that say how many processes there are and which this is.

    What mpirun says counts where accelerate started it; else the processes may have nothing to do with each other.
    """
    if "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ:
        return next((words for words in _MPI if words[0] in os.environ), _TORCH)
    return _TORCH


def local_device(device: str) -> str:
    """Return this process's own GPU for 'cuda' where several processes share a machine; else ``device``."""
    if device == "cuda" and started().several:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the other processes for a training on ``device`` ('auto' is a GPU where there is one).

    Raises:
        ConfigError: the launcher has said too little to find the others.
    """
    processes = started()
    if not processes.several or dist.is_initialized():
        yield processes
        return
    missing = [name for name in (*_MEETING, _words()[1]) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"started as one of {processes.count} processes, but {', '.join(missing)} is not set. "
            "Start with torchrun or accelerate launch."
        )
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if on_gpu else "gloo"
    count, rank = processes.count, processes.rank
    _talked(lambda: dist.init_process_group(backend, timeout=PATIENCE, world_size=count, rank=rank))
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def _talked(action: Callable[[], Any]) -> None:
    try:
        action()
    except (RuntimeError, dist.DistError) as error:
        raise TrainingError(
            f"another process of this training has ended or cannot be reached ({str(error).splitlines()[0]}). "
            "Its own message says why."
        ) from error
