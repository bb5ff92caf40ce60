"""CorDA: the pair takes the part of a weight that the examples use most, or least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import DataError
from lorakit.inits.corda import DAMPING, CorDA, damped
from lorakit.inits.pissa import PiSSA
from lorakit.methods.lora import LoRA, LowRankUpdate

RANK, ALPHA, D_OUT, D_IN, ROWS = 4, 10.0, 40, 56, 256
# fp32 through the inverse of a matrix whose damped condition number is some hundreds
DECOMPOSED = 1e-3


def examples(x: Tensor) -> lk.Calibration:
    return lk.Calibration([{"input": part} for part in x.split(64)])


def inputs() -> Tensor:
    return torch.randn(ROWS, D_IN) / torch.arange(1, D_IN + 1) @ torch.linalg.qr(torch.randn(D_IN, D_IN)).Q


def start(model: nn.Module, init: object, x: Tensor, scaling: str = "standard") -> Tensor:
    """Return ``scale B0 A0``."""
    method = LoRA(rank=RANK, alpha=ALPHA, init=init, scaling=scaling)
    handle = lk.attach(model, method, "0", calibration=examples(x), seed=0)
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    assert update.A0 is not None
    assert update.B0 is not None
    found = update.scale * update.B0 @ update.A0
    handle.detach()
    return found


@pytest.fixture
def model() -> nn.Module:
    """Return a model of one layer."""
    return nn.Sequential(nn.Linear(D_IN, D_OUT))


def components(model: nn.Module, x: Tensor, chosen: slice) -> Tensor:
    """Return the formula in fp64: ``U_k S_k V_k^T C^-1`` with the damped second moments."""
    C = (x.T @ x).double() / len(x)
    C += DAMPING * C.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(model.get_parameter("0.weight").detach().double() @ C, full_matrices=False)
    return ((U[:, chosen] * S[chosen]) @ Vh[chosen] @ torch.linalg.inv(C)).float()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize(("keep", "chosen"), [("task", slice(0, RANK)), ("knowledge", slice(D_OUT - RANK, D_OUT))])
def test_the_pair_is_the_papers_components(model: nn.Module, keep: str, chosen: slice, scaling: str) -> None:
    x = inputs()
    found = start(model, CorDA(keep=keep, rows=ROWS), x, scaling)
    expected = components(model, x, chosen)
    torch.testing.assert_close(found, expected, rtol=0, atol=DECOMPOSED * float(expected.abs().max()))


@pytest.mark.parametrize("seed", [0, 1])
def test_for_the_task_it_holds_more_of_the_output_than_the_principal_part(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    x = inputs()
    own, principal = (start(model, init, x) for init in (CorDA(rows=ROWS), PiSSA()))
    assert (x @ own.T).norm() > (x @ principal.T).norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_for_knowledge_it_holds_next_to_nothing_of_the_output(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    x = inputs()
    found = start(model, CorDA(keep="knowledge", rows=ROWS), x)
    whole = x @ model.get_parameter("0.weight").detach().T
    assert (x @ found.T).norm() <= 0.05 * whole.norm()


def test_moments_that_cannot_be_inverted_are_damped_until_they_can_be() -> None:
    few = torch.randn(3, D_IN)
    C, inverse = damped("layer", few.T @ few / 3)
    assert float(torch.dist(C @ inverse, torch.eye(D_IN))) < 0.05


def test_inputs_that_are_all_zero_are_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(DataError, match="the inputs of '0' are all zero"):
        start(model, CorDA(), torch.zeros(ROWS, D_IN))
