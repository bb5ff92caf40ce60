"""The experiment with the digits: its batches, its choice, its proofs, and on real digits its promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.adapters import Handle, attach
from lorakit.adapters.identity import digest
from lorakit.demos import digits
from lorakit.demos.digits_data import Part, read_digits
from lorakit.demos.digits_proof import EFFECTIVE_WEIGHT_TOLERANCE, changed, claims, merged_difference
from lorakit.methods.lora import LoRA
from lorakit.reports.digits_record import DigitsSummary

from .conftest import some_digits

SEEDS = (0, 1, 2)
LEAST_DROP = 0.7


def noise(count: int = 200) -> Part:
    pixels, labels = some_digits(count)
    return Part(pixels, labels.long())


def test_the_network_has_the_sizes_of_the_lessons() -> None:
    shapes = [tuple(parameter.shape) for parameter in digits.network().parameters()]
    assert shapes == [(1000, 784), (1000,), (2000, 1000), (2000,), (10, 2000), (10,)]


def test_an_epoch_shows_every_image_once() -> None:
    part = noise(95)
    labels = torch.cat([batch for _, batch in digits.one_epoch(part, seed=0)])
    assert labels.bincount().tolist() == part.num_of_each()


def test_both_adapters_see_the_same_images_of_the_digit() -> None:
    part, own = noise(), digits.RECIPE.num_own
    alone, replay = (list(digits.batches_of(part, 4, num_others, seed=0)) for num_others in (0, 20))
    assert len(alone) == len(replay) == 100
    assert all(torch.equal(a[0], b[0][:own]) for a, b in zip(alone, replay, strict=True))


def test_the_replayed_images_are_of_other_digits() -> None:
    for images, labels in digits.batches_of(noise(), 4, 20, seed=0):
        assert len(images) == 30
        assert labels[:10].tolist() == [4] * 10
        assert 4 not in labels[10:].tolist()


def logits_that_say(readings: list[int], sure: float = 1.0) -> torch.Tensor:
    return sure * nn.functional.one_hot(torch.tensor(readings), 10).float()


def test_the_worst_digit_has_the_largest_share_of_errors() -> None:
    labels = [*range(10), 3, 3, 3, 3, 7]
    part = Part(torch.zeros(len(labels), 28, 28), torch.tensor(labels))
    readings = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 3, 3, 1]  # 3: 2 of 5 wrong, 7: 1 of 2
    assert digits.worst_digit(logits_that_say(readings), part) == 7


def test_without_errors_the_worst_digit_is_the_least_certain() -> None:
    part = Part(torch.zeros(10, 28, 28), torch.arange(10))
    logits = logits_that_say(list(range(10)), sure=5.0)
    logits[6] /= 2
    assert digits.worst_digit(logits, part) == 6


def test_changed_digits_are_told_apart_by_their_side() -> None:
    part = Part(torch.zeros(4, 28, 28), torch.tensor([1, 2, 3, 4]))
    repaired, broken = changed(logits_that_say([7, 2, 3, 9]), logits_that_say([1, 8, 3, 6]), part)
    assert [(item.index, item.truth, item.before, item.after) for item in repaired] == [(0, 1, 7, 1)]
    assert [(item.index, item.truth, item.before, item.after) for item in broken] == [(1, 2, 2, 8)]


@pytest.fixture
def trained() -> tuple[Handle, str, torch.Tensor]:
    """Return a handle with an adapter that does something, and the network's digest and logits before it."""
    part, model = noise(50), digits.network()
    before, digest_before = digits.logits_of(model, part), digest(model)
    handle = attach(model, digits.METHOD, targets=digits.LAYERS, name="alone", seed=0)
    digits.train(model, handle.parameters("alone").values(), digits.one_epoch(part, 0), 1e-3)
    return handle, digest_before, before


def passed(trained: tuple[Handle, str, torch.Tensor]) -> list[bool]:
    handle, digest_before, before = trained
    with handle.disabled():
        disabled = digits.logits_of(handle.model, noise(50))
    return [claim.passed for claim in claims(handle, digest_before, before, disabled)]


def test_every_claim_holds_after_training(trained: tuple[Handle, str, torch.Tensor]) -> None:
    assert passed(trained) == [True, True, True, True]


def test_a_changed_weight_is_noticed(trained: tuple[Handle, str, torch.Tensor]) -> None:
    with torch.no_grad():
        trained[0].model.get_parameter("linear3.bias")[0] += 0.5
    assert passed(trained) == [False, False, True, False]


def test_a_forgotten_scale_is_noticed(trained: tuple[Handle, str, torch.Tensor]) -> None:
    handle = trained[0]
    assert merged_difference(handle, "alone") <= EFFECTIVE_WEIGHT_TOLERANCE
    for update in handle.updates("alone").values():
        update.scale = 1.0
    assert merged_difference(handle, "alone") > 100 * EFFECTIVE_WEIGHT_TOLERANCE


def test_alpha_is_not_the_rank() -> None:
    assert isinstance(digits.METHOD, LoRA)
    assert digits.RECIPE.scale == 2.0


def refuted(summary: DigitsSummary) -> list[str]:
    """Return the promises of the demo that do not hold."""
    digit, before = summary.digit, summary.before
    alone, replay = summary.adapter("alone").after, summary.adapter("replay").after
    promises = {
        "alone mends the digit": alone.errors[digit] <= (1 - LEAST_DROP) * before.errors[digit],
        "replay mends the digit": replay.errors[digit] <= (1 - LEAST_DROP) * before.errors[digit],
        "alone forgets": alone.total > before.total,
        "replay makes no more errors in all": replay.total <= before.total,
        "disabled is before": summary.disabled == before,
        "6,794 numbers": (summary.num_added, f"{summary.percent:.3f}") == (6794, "0.242"),
        "all is proven": all(claim.passed for claim in summary.claims),
    }
    return [promise for promise, holds in promises.items() if not holds]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_promises_hold_on_the_bundled_digits(seed: int) -> None:
    pytest.importorskip("sklearn", reason="the extra 'demo' is not installed")
    assert refuted(digits.experiment(read_digits(seed=seed), seed)[1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_promises_hold_on_mnist(shared: Path, seed: int) -> None:
    data = read_digits(shared / "data/mnist", seed)
    assert refuted(digits.experiment(data, seed)[1]) == []
