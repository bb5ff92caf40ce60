"""From device code to kernels: Triton is imported here, on first use, and nowhere else."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Arguments whose value changes from call to call: a kernel compiled anew for each divisor of them gains nothing.
UNSPECIALIZED = ("M", "T", "first", "chunk", "threshold")


@functools.cache
def compiled(name: str) -> ModuleType:
    """Return a module of device code with its functions turned into kernels, as ``kernel[grid](...)``.

    Device functions call each other and ``tl`` through their module's globals, where Triton (and its interpreter)
    looks for them: the names there are rebound, once.

    Args:
        name: the module's name in this package, ``device_linear``.
    """
    triton = importlib.import_module("triton")
    module = importlib.import_module(f"{__package__}.{name}")
    space = vars(module)
    space["tl"] = importlib.import_module("triton.language")
    for key, function in list(space.items()):
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            arguments = inspect.signature(function).parameters
            fixed = [argument for argument in UNSPECIALIZED if argument in arguments]
            space[key] = triton.jit(function, do_not_specialize=fixed)
    return module


def interpreted() -> bool:
    """Tell whether Triton runs its kernels in Python, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on"}


def kind(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of this dtype are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that say how a kernel multiplies values of this dtype.

    fp32 is multiplied as torch would (TF32 only where ``torch.backends.cuda.matmul.allow_tf32`` says so). The
    interpreter keeps bf16 as bits and cannot multiply it: there, the rounded operands are widened.
    """
    wide = accumulator(dtype)
    tf32 = torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32
    return {
        "DOT": kind(wide if interpreted() else dtype),
        "ACC": kind(wide),
        "PRECISION": "tf32" if tf32 else "ieee",
    }


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; powers of two, 16 at least.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile (d_out, or d_in in the backward pass).
        depth: what is summed over at a time.
        ranks: the most ranks of a tile.
        programs: how many programs a launch aims at, so that every processor of the device has work.
        warps: warps per program.
        stages: loads in flight.
    """

    rows: int = 64
    columns: int = 128
    depth: int = 64
    ranks: int = 64
    programs: int = 264
    warps: int = 4
    stages: int = 3

    def launch(self) -> dict[str, Any]:
        """Return the arguments that Triton itself takes."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def rank_block(self, rank: int) -> int:
        """Return the side of a tile for this many ranks: a power of two, 16 at least (the tensor core's least)."""
        return min(self.ranks, max(16, 1 << (rank - 1).bit_length()))

    def masked_rows(self) -> int:
        """Return the rows of a tile whose dropout mask is made: half as many, as the mask takes registers too."""
        return max(16, self.rows // 2)

    def share(self, size: int, block: int, others: int) -> int:
        """Return the length of a chunk of ``size``, in whole blocks, when ``others`` programs run for each chunk.

        >>> Tiles(programs=264).share(4096, 64, others=64)
        1024
        """
        blocks = -(-size // block)
        chunks = max(1, min(blocks, self.programs // max(1, others)))
        return -(-blocks // chunks) * block


def tiles_for(x: Tensor) -> Tiles:
    """Return the tiles for activations of this dtype on this device: two programs per processor of a GPU."""
    wide = x.element_size() >= 4
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return Tiles(depth=32 if wide else 64, columns=64 if wide else 128, programs=2 * processors)


@functools.lru_cache(maxsize=4096)
def addresses(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a device tensor of addresses, so that kernels read tensors that lie anywhere; made once per set."""
    return torch.tensor(places, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=4096)
def integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a device tensor of these numbers; made once per set."""
    return torch.tensor(values, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=4096)
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a device tensor of these factors in fp32; made once per set."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover ``size``."""
    return -(-size // block)


def positions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the tensors' addresses, 0 for None."""
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
