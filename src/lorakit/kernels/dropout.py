"""Dropout masks that cost a multiplication: read from a pool of random bits at a place that a seed says.

A pass of ``bernoulli_`` costs a CPU as much as a fifth of the layer's own product. Here the bits of one probability
are drawn once, and a mask is a run of them: a seed says where it begins. So nothing is stored for the backward pass
but the seed. Within a run the bits are independent; two runs hold the same bits only where they overlap, by another
place in the input each time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

POOL = 2**22
"""Bits in a pool. The larger, the rarer two masks share some."""

RUN = 2**20
"""A longer mask is put together of runs of so many bits, each from a place of its own."""

ALIGN = 64
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it are spread evenly


def draw_seed() -> int:
    """Draw a seed from torch's generator of the CPU, which checkpointing and a resumed run restore."""
    drawn = torch.randint(2**62, (1,))
    if not is_real(drawn):  # only sizes count
        return 0
    return int(drawn)


def mask(shape: torch.Size, p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ones, and zeros with probability ``p``, in this dtype; the same for the same seed.

    The numbers must not be changed: they are part of the pool.

    Args:
        shape: of the mask.
        p: probability of a zero, in ``[0, 1)``.
        seed: what :func:`draw_seed` returned.
        dtype: of the tensor that it multiplies.
        device: where it is needed.
    """
    if not is_real(torch.empty(0)):  # a simulation: a mask takes no memory of its own
        return torch.empty(1, dtype=dtype, device=device).expand(shape)
    bits = _pool(p, dtype, str(device))
    count = shape.numel()
    if count <= RUN:
        start = _start(seed, 0)
        return bits[start : start + count].view(shape)
    starts = [_start(seed, i) for i in range(-(-count // RUN))]
    lengths = [min(RUN, count - i * RUN) for i in range(len(starts))]
    return torch.cat([bits[s : s + n] for s, n in zip(starts, lengths, strict=True)]).view(shape)


def prepare(p: float, dtype: torch.dtype, device: torch.device) -> None:
    """Draw the pool of a probability, once in a process, so that the first step neither waits nor pays for it."""
    mask(torch.Size((1,)), p, 0, dtype, device)


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Return ``x * mask / (1 - p)``, differentiable in ``x``."""
    return x * mask(x.shape, p, seed, x.dtype, x.device) * (1.0 / (1.0 - p))


def _start(seed: int, run: int) -> int:
    """Return where a run begins, spread over the pool by multiplicative hashing (Knuth, vol. 3, section 6.4)."""
    mixed = ((seed + run) * _ODD) % 2**64
    return (mixed >> 32) % ((POOL - RUN) // ALIGN) * ALIGN


def is_real(tensor: Tensor) -> bool:
    """Tell whether a tensor has numbers (a simulation's have only sizes)."""
    return type(tensor) is Tensor and not tensor.is_meta


@functools.lru_cache(maxsize=8)
def _pool(p: float, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0x10BA)
    return (torch.rand(POOL, generator=generator) >= p).to(device, dtype)
