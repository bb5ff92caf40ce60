"""Dropout without a stored mask: every element's fate follows from (seed, row, column).

The generator is Philox4x32 with seven rounds (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3"), the fewest that its authors found no flaw in. The counter is (column // 8, row, 0, 0), the key is the
seed's two halves; the four words are cut into eight numbers of 16 bits, one for each column of the group, low half
first. So p is rounded to the next multiple of 1 / 65536, and the survivors' gain to that p.

The functions here are the definition, in torch; the kernels make the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import ConfigError

_WORD = 0xFFFFFFFF
_ROUNDS = 7
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_RAISE = (0x9E3779B9, 0xBB67AE85)


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator of that device, without waiting for it: one int64.

    Gradient checkpointing restores that generator before it computes a layer again, hence the same mask.
    """
    return torch.randint(0, 2**62, (1,), device=device)


def threshold(p: float) -> int:
    """Return p in 65536ths.

    >>> threshold(0.1)
    6554

    Raises:
        ConfigError: p is no probability below 1.
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout {p} is not in [0, 1).")
    return min(round(p * 65536), 65535)


def gain(p: float) -> float:
    """Return the factor on what is kept, so that the mean stays.

    >>> gain(0.5)
    2.0
    """
    return 65536 / (65536 - threshold(p))


def keep_mask(seed: Tensor, num_rows: int, num_columns: int, p: float) -> Tensor:
    """Return which elements of a ``[num_rows, num_columns]`` matrix are kept, as booleans on the seed's device."""
    rows = torch.arange(num_rows, device=seed.device)[:, None]
    groups = torch.arange(-(-num_columns // 8), device=seed.device)[None, :]
    words = _philox(groups.expand(num_rows, -1), rows.expand(-1, groups.shape[1]), seed)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)
    return halves.reshape(num_rows, -1)[:, :num_columns] >= threshold(p)


def _philox(first: Tensor, second: Tensor, seed: Tensor) -> Tensor:
    """Return the four words ``[..., 4]`` of the counters (first, second, 0, 0), each in an int64."""
    counter = [first, second, torch.zeros_like(first), torch.zeros_like(first)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        high_a, low_a = _wide_product(_MULTIPLY[0], counter[0])
        high_b, low_b = _wide_product(_MULTIPLY[1], counter[2])
        counter = [high_b ^ counter[1] ^ key[0], low_b, high_a ^ counter[3] ^ key[1], low_a]
        key = [(part + step) & _WORD for part, step in zip(key, _RAISE, strict=True)]
    return torch.stack(counter, dim=-1)


def _wide_product(factor: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of ``factor * values``, both below 2^32, without leaving int64."""
    low, high = (factor & 0xFFFF) * values, (factor >> 16) * values
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
