"""DoRA's forward and backward make no dense ``[d_out, d_in]`` temporary; and its dropout is right on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit as lk
from lorakit.kernels.dropout import _pool

# Four standard errors of a mean over this many masks: a sound mean misses by chance once in some ten thousand numbers.
MASKS, STANDARD_ERRORS = 1500, 4.5


def pools() -> set[int]:
    """Return where the process's pools of masks lie, which stay."""
    return {_pool(0.5, dtype, "cpu").untyped_storage().data_ptr() for dtype in (torch.float32, torch.bfloat16)}


class Allocations(TorchDispatchMode):
    """Notes the elements of the largest new storage that any operation returns, forward or backward."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known} | pools()
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                if size > self.largest:
                    self.largest, self.by = size, str(func)
        return out


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(80, 96), (4, 80)),
    "linear without bias": (lambda: nn.Linear(80, 96, bias=False), (2, 3, 80)),
    "conv2d": (lambda: nn.Conv2d(24, 40, (3, 2), padding=1), (2, 24, 4, 4)),
    "conv1d in groups": (lambda: nn.Conv1d(48, 96, 5, groups=2), (1, 48, 7)),
}


def one_step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def adapted(host: str, dtype: torch.dtype, **fields: object) -> tuple[nn.Module, Tensor]:
    make, shape = HOSTS[host]
    model = nn.Sequential(make()).to(dtype)
    handle = lk.attach(model, lk.DoRA(rank=2, alpha=3, **fields), "0")
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", HOSTS)
def test_a_step_allocates_nothing_as_large_as_the_weight(host: str, dtype: torch.dtype, dropout: float) -> None:
    model, x = adapted(host, dtype, dropout=dropout)
    weight = model[0].weight
    with Allocations(list(model.parameters())) as allocated:
        one_step(model.train(), x)
    assert 0 < allocated.largest < weight.numel(), allocated.by


@pytest.mark.parametrize("host", ["linear", "conv2d"])
def test_a_dense_norm_would_be_noticed(host: str) -> None:
    model, x = adapted(host, torch.float32)
    weight = model[0].weight
    update = next(iter(lk.handle_of(model).updates().values()))  # type: ignore[union-attr]
    with Allocations(list(model.parameters())) as allocated:
        one_step(model, x)
        torch.linalg.vector_norm(weight.flatten(1) + update.B @ update.A, dim=1)  # type: ignore[operator]
    assert allocated.largest >= weight.numel()


@pytest.mark.parametrize("host", ["linear", "conv2d"])
def test_the_mean_over_dropout_masks_is_the_output_without_dropout(host: str) -> None:
    model, x = adapted(host, torch.float32, dropout=0.3)
    with torch.no_grad():
        expected = model.eval()(x).double()
        model.train()
        outs = torch.stack([model(x) for _ in range(MASKS)]).double()
    error = (outs.mean(0) - expected).abs()
    # Where no input reaches an output through the update, all masks agree and only rounding is left.
    assert (error <= STANDARD_ERRORS * outs.std(0) / MASKS**0.5 + 1e-5).all()
