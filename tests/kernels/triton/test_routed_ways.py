"""A model's mixed batches on the kernels, where these are asked for: what the other ways and the plain path compute."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit import kernels
from lorakit.adapters import Handle
from lorakit.kernels import triton
from lorakit.kernels.routed import WAYS, Pairs, Way
from lorakit.kernels.routed_product import add_products, add_trained, taken
from lorakit.kernels.segments import Segments
from lorakit.kernels.triton.ways import KERNELS

# Sums of some dozens of terms of order 1 in another order; bf16 keeps 8 bits, which the interpreter cuts off, and both
# sides round A x to them.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}
D_IN, D_OUT = 40, 72  # of two tiles each in fp32, neither whole
RANKS, SCALES = (2, 20, 3), (2.0, 0.5, -1.5)
PREFILL = [1] * 9 + [-1, 0, 2] * 3 + [1] * 12  # a group of two tiles, groups of less than one, rows of none
DECODE = [2, -1, 1, 0]
routes = pytest.mark.parametrize("codes", [PREFILL, DECODE], ids=["prefill", "decode"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_way = pytest.mark.parametrize("way", KERNELS, ids=[way.name for way in KERNELS])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """Ask for the kernels; in the interpreter, let them take tensors on the CPU on their other conditions."""
    monkeypatch.setenv(triton.SWITCH, "1")

    def applies(x: Tensor) -> bool:
        return triton.chosen() and x.dtype in triton.DTYPES and not torch.is_autocast_enabled("cpu")

    if device.type == "cpu":
        monkeypatch.setattr(triton, "applies", applies)
    return device


class Inputs:
    """Factors, input and output of one routed product."""

    def __init__(
        self, codes: Sequence[int], dtype: torch.dtype, device: torch.device, factors: Sequence[torch.dtype] = ()
    ) -> None:
        def draw(*size: int) -> Tensor:
            return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(device)

        generator, kinds = torch.Generator().manual_seed(0), factors or [dtype] * len(RANKS)
        self.A = [draw(rank, D_IN).to(kind) for rank, kind in zip(RANKS, kinds, strict=True)]
        self.B = [draw(D_OUT, rank).to(kind) for rank, kind in zip(RANKS, kinds, strict=True)]
        self.x, self.out = draw(len(codes), D_IN).to(dtype) * 6, draw(len(codes), D_OUT).to(dtype)
        self.segments = Segments(torch.tensor(codes), len(RANKS), device)

    def pairs(self) -> Pairs:
        return Pairs(self.A, self.B, SCALES, self.out.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.out, self.x, *self.A, *self.B]


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCE[dtype] * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


# One layer ------------------------------------------------------------------------------------------


@every_way
@routes
@dtypes
def test_the_kernels_add_what_the_other_ways_do(
    device: torch.device, way: Way, codes: list[int], dtype: torch.dtype
) -> None:
    inputs = Inputs(codes, dtype, device)
    expected, free = inputs.out.clone(), torch.tensor(codes) < 0
    add_products(expected, inputs.x, inputs.pairs(), inputs.segments, WAYS["loop"])
    inputs.out[free] = -0.0
    inputs.x[free] = torch.nan
    add_products(inputs.out, inputs.x, inputs.pairs(), inputs.segments, way)
    assert_close(inputs.out[~free], expected[~free], dtype)
    assert torch.equal(inputs.out[free].signbit(), torch.ones_like(inputs.out[free], dtype=torch.bool))


@every_way
@pytest.mark.parametrize(
    ("codes", "dtype", "factors"),
    [
        (PREFILL, torch.float32, ()),
        (DECODE, torch.float32, ()),
        (PREFILL, torch.bfloat16, ()),
        (PREFILL, torch.bfloat16, [torch.float32] * 3),
        (DECODE, torch.bfloat16, [torch.float32, torch.bfloat16, torch.float32]),
    ],
    ids=["fp32", "fp32, decode", "bf16", "bf16, factors in fp32", "bf16, factors of several dtypes"],
)
def test_the_kernels_have_the_other_ways_derivatives(
    device: torch.device, way: Way, codes: list[int], dtype: torch.dtype, factors: list[torch.dtype]
) -> None:
    inputs = Inputs(codes, dtype, device, factors)
    out, x, *parts = tensors = [tensor.requires_grad_() for tensor in inputs.tensors()]
    weights = torch.randn(len(codes), D_OUT, device=device).to(dtype)
    found = []
    for each in (way, WAYS["loop"]):
        result = add_trained(out * 1.0, x, parts[:3], parts[3:], SCALES, inputs.segments, each)
        found.append(torch.autograd.grad(result, tensors, weights))
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        assert_close(mine, other, dtype)


def test_gradients_of_wide_factors_are_not_rounded_to_the_layers_dtype(asked: torch.device) -> None:
    inputs = Inputs(PREFILL, torch.bfloat16, asked, [torch.float32] * 3)
    parts = [factor.requires_grad_() for factor in (*inputs.A, *inputs.B)]
    result = add_trained(inputs.out, inputs.x, parts[:3], parts[3:], SCALES, inputs.segments)
    for gradient in torch.autograd.grad(result.float().square().sum(), parts):
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize(
    ("codes", "trained", "name"),
    [
        (DECODE, False, "triton by rows"),
        (DECODE, True, "triton by segments"),
        (PREFILL, False, "triton by segments"),
    ],
    ids=["decode", "decode, trained", "prefill"],
)
def test_rows_are_taken_one_by_one_only_where_they_are_few(
    asked: torch.device, codes: list[int], trained: bool, name: str
) -> None:
    inputs = Inputs(codes, torch.float32, asked)
    assert taken(inputs.x, inputs.pairs(), inputs.segments, trained).name == name


# A model --------------------------------------------------------------------------------------------

ROUTES: dict[str, list[str | None]] = {"prefill": ["b", "a", None, "b", "a", "c"], "decode": ["c", None, "b", "a"]}
LENGTHS = {"prefill": 7, "decode": 1}
batches = pytest.mark.parametrize("batch", ROUTES)


class Body(nn.Module):
    """Two linear layers, neither square, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(D_IN, 24)
        self.down = nn.Linear(24, D_IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(batch: str, dtype: torch.dtype, device: torch.device) -> tuple[Body, Handle, Tensor]:
    """Attach adapters of several ranks and scales, one on one layer only and one that is more than a pair."""
    model = Body().to(device, dtype)
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=5), "up,down", name="a")
    handle.add("b", lk.LoRA(rank=18, alpha=9), "up")
    handle.add("c", lk.DoRA(rank=3, alpha=4), "up")
    handle.strengthen("b", -0.5)
    generator = torch.Generator().manual_seed(1)
    for name in handle.names:
        for parameter in handle.parameters(name).values():
            parameter.data.add_((torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter))
    return model, handle, torch.randn(len(ROUTES[batch]), LENGTHS[batch], D_IN, generator=generator).to(device, dtype)


def computed(model: Body, handle: Handle, x: Tensor, batch: str) -> tuple[Tensor, bool]:
    """Return the output of a mixed batch, and whether kernels made it."""
    with handle.routed(ROUTES[batch]):
        out = model(x)
        sorted_rows = model.up.lorakit.active.routing._segments  # type: ignore[union-attr]
        return out, any({"route", "ids"} & set(segments.memo) for segments in sorted_rows.values())


@batches
@dtypes
@pytest.mark.parametrize("grad", [False, True])
def test_a_mixed_batch_is_that_of_the_plain_path(
    asked: torch.device, batch: str, dtype: torch.dtype, grad: bool
) -> None:
    model, handle, x = adapted(batch, dtype, asked)
    with torch.set_grad_enabled(grad):
        found, on_kernels = computed(model, handle, x, batch)
        with kernels.use("plain"):
            expected, plain_on_kernels = computed(model, handle, x, batch)
    assert (on_kernels, plain_on_kernels) == (True, False)
    assert_close(found, expected, dtype)


@batches
@dtypes
def test_gradients_of_a_mixed_batch_are_those_of_the_plain_path(
    asked: torch.device, batch: str, dtype: torch.dtype
) -> None:
    model, handle, x = adapted(batch, dtype, asked)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    gradients = []
    for paths in ("fast", "plain"):
        own = x.clone().requires_grad_()
        with kernels.use(paths):  # type: ignore[arg-type]
            out, on_kernels = computed(model, handle, own, batch)
        assert on_kernels == (paths == "fast")
        out.backward(weights)
        parameters = {(n, k): p for n in handle.names for k, p in handle.parameters(n).items()}
        gradients.append({"x": own.grad, **{key: p.grad for key, p in parameters.items()}})
        model.zero_grad()
    for key, expected in gradients[1].items():
        assert_close(gradients[0][key], expected, dtype)


@torch.no_grad()
def test_rows_of_the_base_keep_its_bits(asked: torch.device) -> None:
    model, handle, x = adapted("prefill", torch.float32, asked)
    with handle.disabled():
        base = model(x)
    assert torch.equal(computed(model, handle, x, "prefill")[0][2], base[2])


@torch.no_grad()
def test_the_kernels_leave_other_numbers_to_the_other_ways(asked: torch.device) -> None:
    model, handle, x = adapted("prefill", torch.float64, asked)
    assert not computed(model, handle, x, "prefill")[1]


@pytest.mark.parametrize("grad", [False, True])
def test_the_kernels_are_not_used_under_autocast(asked: torch.device, grad: bool) -> None:
    model, handle, x = adapted("prefill", torch.float32, asked)
    with torch.set_grad_enabled(grad), torch.autocast(asked.type, torch.bfloat16):
        assert not computed(model, handle, x, "prefill")[1]


def test_the_kernels_are_not_used_unless_asked_for(asked: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton.SWITCH)
    model, handle, x = adapted("prefill", torch.float32, asked)
    assert not computed(model, handle, x, "prefill")[1]


def test_inference_and_training_may_share_a_route(asked: torch.device) -> None:
    model, handle, x = adapted("prefill", torch.float32, asked)
    with handle.routed(ROUTES["prefill"]):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    assert handle.parameters("a")["up.A"].grad is not None
