"""Masks from a pool: as random as torch's where it matters, and the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from lorakit.kernels.dropout import POOL, RUN, draw_seed, dropped, mask

CPU = torch.device("cpu")


def bits(rows: int, columns: int, p: float, seed: int) -> torch.Tensor:
    return mask(torch.Size((rows, columns)), p, seed, torch.float32, CPU)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**61])
def test_zeros_come_as_often_as_the_probability_says(p: float, seed: int) -> None:
    found = bits(512, 512, p, seed)
    # Five standard deviations of a binomial count.
    assert abs(float((found == 0).float().mean()) - p) < 5 * math.sqrt(p * (1 - p) / found.numel())
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_rows_and_columns_do_not_follow_each_other() -> None:
    found = bits(1024, 64, 0.5, 7) * 2 - 1
    # Independent signs correlate with a standard deviation of 1 / sqrt(count); the largest of 2016 pairs: 5 of it.
    among_columns = (found.T @ found / len(found)).fill_diagonal_(0).abs().max()
    assert among_columns < 5 / math.sqrt(len(found))
    assert abs(float((found[1:] * found[:-1]).mean())) < 5 / math.sqrt(found[1:].numel())


def test_the_same_seed_gives_the_same_mask_and_others_give_others() -> None:
    assert torch.equal(bits(64, 64, 0.3, 11), bits(64, 64, 0.3, 11))
    masks = [bits(64, 64, 0.3, seed) for seed in range(50)]
    assert len({tuple(m.flatten().tolist()) for m in masks}) == 50


def test_masks_of_successive_seeds_agree_no_more_than_by_chance() -> None:
    p, count = 0.5, 64 * 64
    agreements = [float((bits(64, 64, p, s) == bits(64, 64, p, s + 1)).float().mean()) for s in range(100)]
    assert max(abs(share - 0.5) for share in agreements) < 5 * math.sqrt(0.25 / count)


def test_a_mask_longer_than_a_run_does_not_repeat() -> None:
    found = bits(3, RUN, 0.5, 3)
    assert not torch.equal(found[0], found[1])
    assert abs(float((found[0] == found[1]).float().mean()) - 0.5) < 0.01
    assert found.numel() < POOL


def test_the_mean_of_what_is_dropped_is_what_was_given() -> None:
    x = torch.ones(256, 256)
    mean = torch.stack([dropped(x, 0.25, seed) for seed in range(20)]).mean()
    assert float(mean) == pytest.approx(1.0, abs=5 * math.sqrt(1 / 3 / (20 * x.numel())))


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(5)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(5)
    assert [draw_seed(), draw_seed()] == first
    assert first[0] != first[1]


def test_a_simulation_needs_no_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = dropped(torch.ones(4, 4), 0.5, draw_seed())
    assert found.shape == (4, 4)
    assert torch.equal(bits(4, 4, 0.5, 0), bits(4, 4, 0.5, 0))  # no tensor without numbers is kept
