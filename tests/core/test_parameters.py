"""Parameters of modules of one's own, adapted by their name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import LorakitError, RoutingError, UnsupportedLayerError, VerificationError

from .models import METHODS, fill_with_noise, method_named

SUM_ORDER = 2e-5  # fp32 sums over some ten terms of order 1, in another order
ROWS = 6


class Mixes(nn.Module):
    """A layer of one's own with a matrix, a stack of them, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.stack = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 4, 5))
        self.unread, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,hjk->bhk", torch.tanh(x + self.shift), self.mix, self.stack)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Mixes()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_of_any_module_is_adapted_by_its_name(method: str) -> None:
    model = Around()
    x = torch.randn(ROWS, 6)
    base = model(x)
    handle = lk.attach(model, method_named(method, rank=2), "own.mix,own.stack")
    assert torch.equal(model(x), base)
    assert {path: site.kind for path, site in handle.state().sites.items()} == dict.fromkeys(
        ["own.mix", "own.stack"], "parameter"
    )
    fill_with_noise(handle)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.parameters().values())
    adapted, state = model(x), handle.state()
    assert handle.delta("own.stack").shape == (3, 4, 5)
    assert handle.coverage().unreached == (("own.unread", 16),)
    handle.merge()
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=SUM_ORDER)
    handle.unmerge()
    handle.detach()
    assert type(model.own) is Mixes
    Handle(model).add_state(state)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=SUM_ORDER)


def test_a_parameter_is_not_routed_whose_positions_are_not_known() -> None:
    model, x = Around(), torch.randn(ROWS, 6)
    handle = lk.attach(model, lk.LoRA(rank=2), "own.mix")
    match = r"the parameter 'mix' of a Mixes is updated.*cannot be routed"
    with pytest.raises(RoutingError, match=match), handle.routed(["default"] * ROWS):
        model(x)
    with handle.routed([None] * ROWS):
        model(x)


def test_a_parameter_that_is_never_read_is_found() -> None:
    handle = lk.attach(Around(), lk.LoRA(rank=2), "own.mix,own.unread")
    with pytest.raises(VerificationError, match=r"1 of 2 sites do not move the output: 'own\.unread'"):
        handle.verify(torch.randn(ROWS, 6))


@pytest.mark.parametrize("target", ["own.shift", "own.mixx", "mix2"])
def test_a_vector_or_a_name_that_is_not_there_is_refused(target: str) -> None:
    with pytest.raises(LorakitError, match=f"no layer matches target '{target}'"):
        lk.attach(Around(), lk.LoRA(rank=2), target)


def test_a_module_of_ones_own_is_refused_with_the_names_of_its_matrices() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"'own' is a Mixes.*its own weights: 'own\.mix', 'own\.stack'"):
        lk.attach(Around(), lk.LoRA(rank=2), "own")
