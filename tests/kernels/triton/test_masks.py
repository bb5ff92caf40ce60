"""The dropout mask: a function of seed, row and column."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.kernels.triton import launch, masks

SEED = torch.tensor([0x1234567_89ABCDEF])
SIGMAS = 5.0  # of a count of independent draws; passed by chance alone all but once in two million times


def test_the_generator_gives_the_published_numbers() -> None:
    # philox4x32, 7 rounds, counter and key zero: tests/kat_vectors of Random123 1.14 (D. E. Shaw Research).
    zero = torch.zeros(1, dtype=torch.int64)
    assert [f"{word:08x}" for word in masks._philox(zero, zero, zero)[0].tolist()] == [
        "5f6fb709",
        "0d893f64",
        "4f121f81",
        "4f730a48",
    ]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_as_many_are_dropped_as_asked(p: float) -> None:
    keep = masks.keep_mask(SEED, 300, 701, p)
    spread = (p * (1 - p) * keep.numel()) ** 0.5
    assert abs((~keep).sum().item() - p * keep.numel()) < SIGMAS * spread


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, 1), (0, 2), (0, 4), (0, 8), (1, 1)])
def test_neighbours_are_independent(rows: int, columns: int) -> None:
    keep = masks.keep_mask(SEED, 300, 704, 0.5)[: 300 - rows, : 704 - columns]
    moved = masks.keep_mask(SEED, 300, 704, 0.5)[rows:, columns:]
    assert abs((keep == moved).sum().item() - keep.numel() / 2) < SIGMAS * (keep.numel() / 4) ** 0.5


def test_an_element_s_fate_does_not_depend_on_the_matrix_around_it() -> None:
    assert torch.equal(masks.keep_mask(SEED, 9, 30, 0.3)[:4, :13], masks.keep_mask(SEED, 4, 13, 0.3))


def test_another_seed_is_another_mask() -> None:
    assert not torch.equal(masks.keep_mask(SEED, 9, 30, 0.3), masks.keep_mask(SEED + (1 << 32), 9, 30, 0.3))


def test_what_is_kept_makes_up_for_what_is_dropped() -> None:
    assert masks.gain(0.1) * (1 - masks.threshold(0.1) / 65536) == pytest.approx(1.0, abs=1e-15)  # one rounding


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_p_that_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="not in"):
        masks.threshold(p)


@pytest.mark.parametrize(("rows", "columns", "p"), [(37, 70, 0.3), (1, 5, 0.5), (16, 32, 0.999)])
def test_kernels_make_the_same_bits(device: torch.device, rows: int, columns: int, p: float) -> None:
    out = torch.full((rows, columns), 7, dtype=torch.int8, device=device)
    grid = (launch.cdiv(rows, 16), launch.cdiv(columns, 32))
    seed = SEED.to(device)
    launch.compiled("device_linear").mask[grid](out, seed, rows, columns, masks.threshold(p), BM=16, BK=32)
    assert torch.equal(out.bool(), masks.keep_mask(seed, rows, columns, p))
