"""Convolutions with every option of torch's, against the host's own forward with the dense weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ShapeError, UnsupportedLayerError
from lorakit.layers import Site

from .models import METHODS, OneLayer, fill_with_noise, method_named

SUM_ORDER = 2e-5  # two fp32 sums over some hundred terms of order 1, in another order
ROWS = 3
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (11,), 2: (9, 7), 3: (6, 5, 7)}

# Each dimension of the kernel's movement with its own numbers, so that none can be mistaken for another.
STRIDE = {1: 2, 2: (2, 1), 3: (1, 2, 1)}
DILATION = {1: 2, 2: (1, 2), 3: (2, 1, 2)}
KERNEL = {1: 3, 2: (3, 2), 3: (2, 3, 2)}
PADDING = {1: 2, 2: (1, 2), 3: (0, 2, 1)}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": STRIDE},
    "one number for all": {"stride": 2, "padding": 1},
    "padding": {"padding": PADDING},
    "same": {"padding": "same"},
    "same with an even kernel": {"padding": "same", "kernel_size": 2},
    "same with dilation": {"padding": "same", "dilation": DILATION},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": DILATION, "padding": PADDING},
    "kernel of 1": {"kernel_size": 1, "out_channels": 7},
    "without bias": {"bias": False, "stride": STRIDE},
    "groups": {"groups": 2, "padding": PADDING, "stride": STRIDE},
    "by depth": {"groups": 4, "out_channels": 4, "padding": "same"},
    "by depth, two for each": {"groups": 4, "out_channels": 8, "padding": PADDING},
    "everything": {"groups": 2, "padding": PADDING, "stride": STRIDE, "dilation": DILATION, "bias": False},
    **{
        f"{mode}, {name}": {"padding_mode": mode, **fields}
        for mode in ("reflect", "replicate", "circular")
        for name, fields in (
            ("padding", {"padding": PADDING}),
            ("same", {"padding": "same", "dilation": DILATION}),
            ("groups", {"padding": PADDING, "groups": 2}),
        )
    },
}
UPWARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": STRIDE},
    "padding": {"stride": STRIDE, "padding": {1: 1, 2: (1, 0), 3: (0, 1, 1)}},
    "output padding": {"stride": 2, "output_padding": {1: 1, 2: (1, 0), 3: (0, 1, 1)}},
    "dilation": {"stride": STRIDE, "dilation": DILATION},
    "output padding below the dilation": {"dilation": 2, "output_padding": 1},
    "groups": {"groups": 2, "stride": STRIDE, "padding": 1},
    "by depth": {"groups": 4, "out_channels": 8, "stride": 2, "output_padding": 1},
    "without bias": {"bias": False},
}


def layer(table: dict[int, type[nn.Module]], dims: int, options: dict[str, Any]) -> nn.Module:
    fields = {"in_channels": 4, "out_channels": 6, "kernel_size": KERNEL, **options}
    return table[dims](**{key: value[dims] if isinstance(value, dict) else value for key, value in fields.items()})


def attached(module: nn.Module, method: str) -> tuple[OneLayer, Handle]:
    model = OneLayer(module).eval()
    handle = lk.attach(model, method_named(method, rank=2), "layer")
    fill_with_noise(handle)
    return model, handle


def by_the_dense_weight(model: nn.Module, handle: Handle, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the host's own forward computes with W + delta in W's place."""
    layer = model.get_submodule("layer")
    ops = Site.at(model, "layer").ops
    weight = ops.weight(layer) + ops.as_weight(layer, handle.delta("layer"))
    with handle.disabled():
        return torch.func.functional_call(layer, {"weight": weight}, args, kwargs)


def check(module: nn.Module, dims: int, method: str) -> None:
    """Compare forward, merged forward and routed rows with the dense truth; batched and unbatched."""
    model, handle = attached(module, method)
    x = torch.randn(ROWS, 4, *SIZES[dims])
    with torch.no_grad():
        truth = by_the_dense_weight(model, handle, x)
        with handle.disabled():
            base = model(x)
        assert (truth - base).abs().max() > 100 * SUM_ORDER
        torch.testing.assert_close(model(x), truth, rtol=0, atol=SUM_ORDER)
        torch.testing.assert_close(model(x[0]), truth[0], rtol=0, atol=SUM_ORDER)
        with handle.routed(["default", None, "default"]):
            mixed = model(x)
        assert torch.equal(mixed[1], base[1])
        torch.testing.assert_close(mixed[[0, 2]], truth[[0, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        torch.testing.assert_close(model(x), truth, rtol=0, atol=SUM_ORDER)


sweep = [*itertools.product(OPTIONS, (1, 2, 3))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own
@pytest.mark.parametrize(("options", "dims"), sweep)
@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_equals_the_dense_truth(method: str, options: str, dims: int) -> None:
    check(layer(CONV, dims, OPTIONS[options]), dims, method)


@pytest.mark.parametrize(("options", "dims"), [*itertools.product(UPWARD, (1, 2, 3))])
@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_convolution_equals_the_dense_truth(method: str, options: str, dims: int) -> None:
    check(layer(TRANSPOSED, dims, UPWARD[options]), dims, method)


@pytest.mark.parametrize("size", [(19, 14), (20, 13), (20, 14)])
@pytest.mark.parametrize("by_name", [True, False])
def test_an_output_size_given_in_the_call_is_kept(size: tuple[int, int], by_name: bool) -> None:
    model, handle = attached(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=(1, 2)), "dora")
    host, x = model.layer, torch.randn(ROWS, 4, 10, 8)
    truth = by_the_dense_weight(model, handle, x, output_size=size)
    call = {"output_size": size, "input": x} if by_name else {"output_size": size}
    args = () if by_name else (x,)
    assert truth.shape[-2:] == size
    torch.testing.assert_close(host(*args, **call), truth, rtol=0, atol=SUM_ORDER)
    with handle.routed([None, "default", None]):
        torch.testing.assert_close(host(*args, **call)[1], truth[1], rtol=0, atol=SUM_ORDER)
    handle.merge()
    torch.testing.assert_close(host(*args, **call), truth, rtol=0, atol=SUM_ORDER)


def test_an_output_size_given_in_the_call_holds_for_a_copy_too() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 6, 3, stride=2), "fc": nn.Linear(4, 4)})
    handle = lk.attach(model, lk.LoRA(rank=2), "fc", train_modules="up")
    fill_with_noise(handle)
    x = torch.randn(2, 4, 5)
    alone = model["up"](x, output_size=(12,))
    assert alone.shape == (2, 6, 12)
    with handle.routed(["default", None]):
        torch.testing.assert_close(model["up"](x, output_size=(12,))[0], alone[0], rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize(
    ("module", "sides"),
    [
        (nn.Conv2d(4, 6, 3), "6 x 36"),
        (nn.Conv2d(1, 9, (1, 2)), "9 x 2"),
        (nn.Conv2d(4, 12, 3, groups=4), "12 x 9"),
        (nn.Conv1d(4, 4, 3, groups=4), "4 x 3"),
        (nn.ConvTranspose2d(8, 12, 2, groups=4), "12 x 8"),
        (nn.ConvTranspose1d(4, 16, 3, groups=4), "16 x 3"),
        (nn.Conv3d(3, 5, 1), "5 x 3"),
    ],
)
def test_a_rank_above_the_kernels_smaller_side_is_refused_by_name(module: nn.Module, sides: str) -> None:
    smaller = min(int(side) for side in sides.split(" x "))
    with pytest.raises(ShapeError, match=rf"rank {smaller + 1} is above the smaller side of 'layer' \({sides}\)"):
        lk.attach(OneLayer(module), lk.LoRA(rank=smaller + 1), "layer")
    assert lk.attach(OneLayer(module), lk.LoRA(rank=smaller), "layer").counts().updates > 0


class Standardised(nn.Conv2d):
    """A convolution that changes its weight on the way, below torch's forward."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


def test_a_convolution_that_convolves_otherwise_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"'layer' \(Standardised\).*its _conv_forward is its own"):
        lk.attach(OneLayer(Standardised(4, 6, 3)), lk.LoRA(rank=2), "layer")


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_dense_weight(groups: int) -> None:
    model, handle = attached(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=groups), "lora")
    model.double()
    x = torch.randn(ROWS, 4, 9, 7, dtype=torch.float64)
    goal = torch.randn_like(model(x))
    (model(x) * goal).sum().backward()
    A, B = (handle.parameters()[f"layer.{name}"] for name in "AB")
    delta = handle.delta("layer").double().requires_grad_()
    ops = Site.at(model, "layer").ops
    weight = ops.weight(model.layer) + ops.as_weight(model.layer, delta)
    with handle.disabled():
        (torch.func.functional_call(model.layer, {"weight": weight}, (x,)) * goal).sum().backward()
    scale = handle.entry("default").method.scale_at("layer")
    assert delta.grad is not None
    torch.testing.assert_close(A.grad, scale * B.detach().T @ delta.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(B.grad, scale * delta.grad @ A.detach().T, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_of_the_base_keep_their_bits_where_channels_lie_last() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    handle = lk.attach(model, lk.LoRA(rank=2), "0")
    fill_with_noise(handle)
    x = torch.randn(ROWS, 4, 9, 7).to(memory_format=torch.channels_last)
    with handle.disabled():
        base = model(x)
    with handle.routed(["default", None, None]):
        first, mixed = model[0](x), model(x)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed[1:], base[1:])
    assert not torch.equal(mixed[0], base[0])
