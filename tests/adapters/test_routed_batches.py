"""Several adapters of one batch at linear layers: the fast path is the plain one, and what it keeps is never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit import kernels
from lorakit.adapters import Handle

# Sums of some dozens of terms of order 1 in another order.
SUM_ORDER = 2e-5
ROWS, LENGTH, WIDTH = 6, 3, 16
ROUTE = ["c", "a", None, "b", "a", "plain"]


class Body(nn.Module):
    """Two linear layers, neither square, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(dtype: torch.dtype = torch.float32) -> tuple[Body, Handle, Tensor]:
    """Attach adapters of other ranks, scales and methods, some on one layer only, all with noise in them."""
    model = Body().to(dtype)
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=5), "up,down", name="a")
    handle.add("b", lk.LoRA(rank=5, alpha=3, scaling="rslora"), "up,down")
    handle.add("c", lk.DoRA(rank=3, alpha=4), "up")
    handle.add("plain", lk.LoRA(rank=4, alpha=2), "down")
    handle.strengthen("b", -0.5)
    generator = torch.Generator().manual_seed(1)
    for name in handle.names:
        for parameter in handle.parameters(name).values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, handle, torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(dtype)


def routed(model: nn.Module, handle: Handle, x: Tensor, paths: str = "fast") -> Tensor:
    with handle.routed(ROUTE), kernels.use(paths):  # type: ignore[arg-type]
        return model(x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_computes_what_the_plain_one_does(dtype: torch.dtype, grad: bool) -> None:
    model, handle, x = adapted(dtype)
    with torch.set_grad_enabled(grad):
        expected, found = routed(model, handle, x, "plain"), routed(model, handle, x)
    rounding = {torch.float32: SUM_ORDER, torch.bfloat16: 0.05}[dtype]  # bf16: a few of 8 bits of order 1
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)


def test_every_adapter_gets_the_plain_paths_gradients() -> None:
    model, handle, x = adapted()
    found = {}
    for paths in ("plain", "fast"):
        own = x.clone().requires_grad_()
        routed(model, handle, own, paths).square().sum().backward()
        parameters = {(n, k): p for n in handle.names for k, p in handle.parameters(n).items()}
        found[paths] = {"x": own.grad, **{key: p.grad for key, p in parameters.items()}}
        model.zero_grad()
    assert found["fast"].keys() == found["plain"].keys()
    for key, gradient in found["fast"].items():
        bound = SUM_ORDER * max(1.0, float(found["plain"][key].abs().max()))
        torch.testing.assert_close(gradient, found["plain"][key], rtol=0, atol=bound)


def test_an_adapter_without_rows_gets_no_gradient() -> None:
    model, handle, x = adapted()
    with handle.routed(["a", None, "a", "plain", None, "a"]):
        model(x).sum().backward()
    assert all(p.grad is None for name in ("b", "c") for p in handle.parameters(name).values())
    assert all(p.grad is not None for name in ("a", "plain") for p in handle.parameters(name).values())


def test_rows_of_the_base_keep_its_bits_also_of_zeros() -> None:
    model, handle, x = adapted()
    x[2] = 0.0
    with torch.no_grad():
        model.up.bias.fill_(-0.0)
        with handle.disabled():
            base = model.up(x)
        with handle.routed(ROUTE):
            mixed = model.up(x)
    assert torch.equal(mixed[2].view(torch.int32), base[2].view(torch.int32))


def test_dropout_acts_in_a_mixed_batch_while_training() -> None:
    model = Body()
    handle = lk.attach(model, lk.LoRA(rank=2, dropout=0.5), "up", name="a")
    handle.add("b", lk.LoRA(rank=2), "up")
    for name in ("a", "b"):
        handle.parameters(name)["up.B"].data.fill_(1.0)
    x = torch.randn(4, WIDTH)
    model.train()
    with handle.routed(["a", "b", "a", "b"]), torch.no_grad():
        first, second = model.up(x), model.up(x)
    assert not torch.equal(first[[0, 2]], second[[0, 2]])
    assert torch.equal(first[[1, 3]], second[[1, 3]])


# What is kept ---------------------------------------------------------------------------------------


def kept_now(model: Body) -> object:
    return model.up.lorakit.together.kept  # type: ignore[union-attr]


@torch.no_grad()
def test_pairs_are_kept_from_one_forward_to_the_next() -> None:
    model, handle, x = adapted()
    routed(model, handle, x)
    first = kept_now(model)
    routed(model, handle, x)
    assert first is not None
    assert kept_now(model) is first


def write(model: Body, handle: Handle) -> None:
    with torch.no_grad():
        handle.parameters("a")["up.A"].mul_(3.0)


def step(model: Body, handle: Handle) -> None:
    parameter = handle.parameters("a")["up.B"]
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, fused=True).step()


def load(model: Body, handle: Handle) -> None:
    state = handle.state("a")
    with torch.no_grad():
        for site in state.sites.values():
            for tensor in site.tensors.values():
                tensor.mul_(2.0)
    handle.set_state(state, "a")


def replace(model: Body, handle: Handle) -> None:
    handle.remove("a")
    handle.add("a", lk.LoRA(rank=7, alpha=9, init="gaussian"), "up,down", seed=3)
    handle.parameters("a")["up.B"].data.fill_(0.3)


def strengthen(model: Body, handle: Handle) -> None:
    handle.strengthen("a", 2.5)


def convert(model: Body, handle: Handle) -> None:
    model.double()


def round_all(model: Body, handle: Handle) -> None:
    model.bfloat16().float()


@pytest.mark.parametrize("change", [write, step, load, replace, strengthen, convert, round_all])
def test_what_is_kept_is_never_stale(change: object) -> None:
    model, handle, x = adapted()
    with torch.no_grad():
        before = routed(model, handle, x)
    change(model, handle)  # type: ignore[operator]
    x = x.to(model.up.weight.dtype)
    with torch.no_grad():
        found, expected = routed(model, handle, x), routed(model, handle, x, "plain")
    torch.testing.assert_close(found, expected, rtol=0, atol=SUM_ORDER * float(expected.abs().max()))
    assert change in (convert, round_all) or not torch.allclose(found[[1, 4]], before[[1, 4]], atol=1e-3)


@torch.no_grad()
def test_removing_an_adapter_drops_what_is_kept() -> None:
    model, handle, x = adapted()
    routed(model, handle, x)
    handle.remove("b")
    assert kept_now(model) is None


def test_training_keeps_nothing() -> None:
    model, handle, x = adapted()
    routed(model, handle, x)
    assert kept_now(model) is None


def test_inference_and_training_may_share_a_route() -> None:
    model, handle, x = adapted()
    with handle.routed(ROUTE):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    assert handle.parameters("a")["up.A"].grad is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_keeps_nothing(clone: object) -> None:
    model, handle, x = adapted()
    routed(model, handle, x)
    assert kept_now(clone(model)) is None  # type: ignore[operator]


def test_a_routed_model_compiles_to_one_graph() -> None:
    model, handle, x = adapted()
    with handle.routed(ROUTE), torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=SUM_ORDER)
