"""``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell``: one step of a recurrent layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import RoutingError

from .models import METHODS, dense_twin, fill_with_noise, method_named

SUM_ORDER = 2e-5  # fp32 sums over some ten terms of order 1, in another order
ROWS, WIDTH, HIDDEN = 4, 5, 4

CELLS: dict[str, Callable[[], nn.RNNCellBase]] = {
    "lstm": lambda: nn.LSTMCell(WIDTH, HIDDEN),
    "gru": lambda: nn.GRUCell(WIDTH, HIDDEN),
    "rnn": lambda: nn.RNNCell(WIDTH, HIDDEN, bias=False),
}


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SUM_ORDER)


class Steps(nn.Module):
    """A cell, called with what it takes."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        out = self.cell(*args, **kwargs)
        return [out] if isinstance(out, Tensor) else [*out]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_equals_the_dense_truth_merged_and_by_row(method: str, name: str) -> None:
    model = Steps(CELLS[name]()).requires_grad_(False)
    handle = lk.attach(model, method_named(method, rank=2), "cell")
    fill_with_noise(handle)
    x, h = torch.randn(ROWS, WIDTH), torch.randn(ROWS, HIDDEN)
    hx = (h, torch.randn(ROWS, HIDDEN)) if name == "lstm" else h
    one = (hx[0][0], hx[1][0]) if isinstance(hx, tuple) else hx[0]
    for args, kwargs in (((x,), {}), ((x, hx), {}), ((), {"hx": hx, "input": x})):
        truth = dense_twin(model, handle)(*args, **kwargs)
        assert_close(model(*args, **kwargs), truth)
        with handle.routed([None, "default", "default", None]):
            mixed = model(*args, **kwargs)
        assert_close([out[[1, 2]] for out in mixed], [out[[1, 2]] for out in truth])
    assert_close(model(x[0], one), [out[0] for out in truth])
    with pytest.raises(RoutingError, match="no batch dimension"), handle.routed(["default"]):
        model(x[0], one)
    handle.merge()
    assert_close(model(x, hx), truth)
