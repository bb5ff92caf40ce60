"""The numbers people know: sizes, a worked example by hand, scales, and how a pair starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle

from .models import KINDS, OneLayer, one_layer

# Sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "rank", "numbers"), [(100, 10, 2_000), (4096, 8, 65_536)])
def test_a_square_layers_pair_has_2_rank_side_numbers(side: int, rank: int, numbers: int) -> None:
    model = OneLayer(nn.Linear(side, side, bias=False, device="meta"))
    counts = lk.attach(model, lk.LoRA(rank=rank), "layer").counts()
    assert counts.trained == numbers
    assert counts.base == side * side


def test_100_by_100_at_rank_10_has_2000_numbers_instead_of_10000() -> None:
    counts = lk.attach(OneLayer(nn.Linear(100, 100, bias=False)), lk.LoRA(rank=10), "layer").counts()
    assert (counts.updates, counts.base, counts.percent) == (2_000, 10_000, 20.0)


def test_the_784_1000_2000_10_network_has_6794_numbers_at_rank_1() -> None:
    network = nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    handle = lk.attach(network, lk.LoRA(rank=1))
    counts = handle.counts()
    # 784*1000 + 1000 + 1000*2000 + 2000 + 2000*10 + 10, and (784 + 1000) + (1000 + 2000) + (2000 + 10)
    assert counts.base == 2_807_010
    assert counts.trained == 6_794
    assert f"{counts.percent:.3f}" == "0.242"
    assert str(counts) == "6,794 trained numbers, 0.242 % of the base's 2,807,010"
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 6_794


# The 3 x 2 example, rank 1 --------------------------------------------------------------------------
#
#   W = [[1, 2], [3, 4], [5, 6]]   A = [0.1, -0.2]   B = [0.3, -0.4, 0.5]   x = [1, 2]   g = dL/dy = [0.2, -0.1, 0.3]
#
#   W x = [1 + 4, 3 + 8, 5 + 12]                     = [5, 11, 17]
#   A x = 0.1 - 0.4                                  = -0.3
#   B A x = -0.3 * B                                 = [-0.09, 0.12, -0.15]
#   B^T g = 0.06 + 0.04 + 0.15                       = 0.25
#   B A                                              = [[0.03, -0.06], [-0.04, 0.08], [0.05, -0.10]]
#
# With the scale s = alpha / rank:
#   y = W x + s B A x,   dL/dA = s (B^T g) x^T,   dL/dB = s g (A x),   W' = W + s B A

EXAMPLE = {
    1.0: {  # y = [5 - 0.09, 11 + 0.12, 17 - 0.15]; dA = 0.25 * [1, 2]; dB = -0.3 * g
        "y": [4.91, 11.12, 16.85],
        "dA": [[0.25, 0.50]],
        "dB": [[-0.06], [0.03], [-0.09]],
        "merged": [[1.03, 1.94], [2.96, 4.08], [5.05, 5.90]],
    },
    2.0: {  # every term of the update twice: y = [5 - 0.18, 11 + 0.24, 17 - 0.30], and so on
        "y": [4.82, 11.24, 16.70],
        "dA": [[0.50, 1.00]],
        "dB": [[-0.12], [0.06], [-0.18]],
        "merged": [[1.06, 1.88], [2.92, 4.16], [5.10, 5.80]],
    },
}
X = torch.tensor([1.0, 2.0])
G = torch.tensor([0.2, -0.1, 0.3])
BY_HAND = 2e-6  # the decimals above have no exact fp32; some ulps (6e-8 relative) of numbers up to 17


def example(alpha: float) -> tuple[OneLayer, Handle]:
    model = OneLayer(nn.Linear(2, 3, bias=False))
    handle = lk.attach(model, lk.LoRA(rank=1, alpha=alpha), "layer")
    parameters = handle.parameters()
    with torch.no_grad():
        model.layer.get_parameter("weight").copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        parameters["layer.A"].copy_(torch.tensor([[0.1, -0.2]]))
        parameters["layer.B"].copy_(torch.tensor([[0.3], [-0.4], [0.5]]))
    return model, handle


def assert_by_hand(found: Tensor | None, expected: list[float]) -> None:
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=BY_HAND)


@pytest.mark.parametrize("alpha", EXAMPLE)
def test_the_forward_is_the_one_by_hand(alpha: float) -> None:
    model, _ = example(alpha)
    assert_by_hand(model(X), EXAMPLE[alpha]["y"])


@pytest.mark.parametrize("alpha", EXAMPLE)
def test_both_gradients_are_those_by_hand(alpha: float) -> None:
    model, handle = example(alpha)
    model(X).backward(G)
    assert_by_hand(handle.parameters()["layer.A"].grad, EXAMPLE[alpha]["dA"])
    assert_by_hand(handle.parameters()["layer.B"].grad, EXAMPLE[alpha]["dB"])


@pytest.mark.parametrize("alpha", EXAMPLE)
def test_the_merged_weight_is_the_one_by_hand(alpha: float) -> None:
    model, handle = example(alpha)
    handle.merge()
    assert_by_hand(model.layer.get_parameter("weight"), EXAMPLE[alpha]["merged"])
    assert_by_hand(model(X), EXAMPLE[alpha]["y"])


@pytest.mark.parametrize("alpha", EXAMPLE)
def test_the_delta_is_the_merged_weight_less_the_weight(alpha: float) -> None:
    _, handle = example(alpha)
    expected = torch.tensor(EXAMPLE[alpha]["merged"]) - torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(handle.delta("layer"), expected, rtol=0, atol=BY_HAND)


# Scales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16.0), (3, 5.0), (64, 1.0)])
def test_the_scale_is_alpha_over_rank(rank: int, alpha: float) -> None:
    assert lk.LoRA(rank=rank, alpha=alpha).scale_at("any") == alpha / rank


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16.0), (3, 5.0), (64, 1.0)])
def test_rslora_divides_by_the_root_of_the_rank(rank: int, alpha: float) -> None:
    assert lk.LoRA(rank=rank, alpha=alpha, scaling="rslora").scale_at("any") == alpha / math.sqrt(rank)


def test_rslora_scales_the_update_that_acts() -> None:
    deltas = {}
    for scaling in ("standard", "rslora"):
        model = one_layer("linear")
        handle = lk.attach(model, lk.LoRA(rank=4, alpha=4, scaling=scaling), "layer", seed=3)
        with torch.no_grad():
            handle.parameters()["layer.B"].fill_(1.0)
        deltas[scaling] = handle.delta("layer")
    torch.testing.assert_close(deltas["rslora"], 2.0 * deltas["standard"])  # sqrt(4)


# How a pair starts ----------------------------------------------------------------------------------

WIDE = OneLayer(nn.Linear(400, 300))


def start(model: nn.Module, **fields: object) -> tuple[Tensor, Tensor]:
    handle = lk.attach(model, lk.LoRA(**fields), "layer")
    A, B = handle.parameters()["layer.A"].detach(), handle.parameters()["layer.B"].detach()
    handle.detach()
    return A, B


def test_kaiming_draws_a_uniformly_up_to_one_over_the_root_of_d_in() -> None:
    A, B = start(WIDE, rank=50)
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < A.max() <= bound
    assert -bound <= A.min() < -0.999 * bound
    # 20,000 draws: the standard error of a uniform's deviation is 0.32 % of it; five of them.
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.016)
    assert A.mean().abs() < 5 * A.std() / math.sqrt(A.numel())
    assert not B.any()


def test_gaussian_draws_a_with_deviation_one_over_the_rank() -> None:
    A, B = start(WIDE, rank=50, init="gaussian")
    assert A.std().item() == pytest.approx(1 / 50, rel=0.025)  # standard error 1/sqrt(2 * 20,000): five of them
    assert A.abs().max() > 3 / 50
    assert not B.any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_an_embedding_starts_reversed(init: str) -> None:
    A, B = start(OneLayer(nn.Embedding(500, 300)), rank=50, init=init)
    assert not A.any()
    assert B.std().item() == pytest.approx(1.0, rel=0.03)  # 15,000 draws: five standard errors


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_zero_at_the_start(kind: str) -> None:
    handle = lk.attach(one_layer(kind), lk.LoRA(rank=3), KINDS[kind].target)
    assert not any(handle.delta(path).any() for path in handle.updates())


def test_a_convolutions_fan_in_is_its_flattened_kernel() -> None:
    A, _ = start(OneLayer(nn.Conv2d(16, 80, 5)), rank=40)
    bound = 1 / math.sqrt(16 * 5 * 5)
    assert A.shape == (40, 400)
    assert 0.99 * bound < A.max() <= bound
