"""Layers that read one input are found while the model runs, and only between optimizer steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit import kernels
from lorakit.adapters import linear_path
from lorakit.kernels.linear import Linear
from lorakit.layers.ops import find_ops
from lorakit.methods import method_names

# Sums of some tens of fp32 products of order 1 in another order.
ROUNDING = 2e-5


class Attention(nn.Module):
    """Three readers of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 10), nn.Linear(12, 10, bias=False), nn.Linear(12, 8)
        self.o = nn.Linear(8, 12)
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x if self.other is None else self.other)
        out: Tensor = self.o(torch.tanh(self.q(x)).sum() * torch.sigmoid(self.k(x)).mean() * v)
        return out


class Blocks(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many layers each node computes for."""
    found: list[int] = []
    compute = linear_path.adapted_linears

    def recorded(x: Tensor, layers: list[Linear], p: float, seed: int) -> tuple[Tensor, ...]:
        found.append(len(layers))
        return compute(x, layers, p, seed)

    monkeypatch.setattr(linear_path, "adapted_linears", recorded)
    return found


def attached(method: lk.Method, checkpointed: bool = False) -> lk.Handle:
    torch.manual_seed(0)
    handle = lk.attach(Blocks(checkpointed).train(), method, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter += 0.1 * torch.randn_like(parameter)
    return handle


def losses(handle: lk.Handle, steps: int = 4, fused: bool = True) -> list[float]:
    """Train a few steps and return the losses."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=1e-2, fused=fused)
    x = torch.randn(3, 5, 12)
    found = []
    for _ in range(steps):
        loss = handle.model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


LORA = lk.LoRA(rank=2, alpha=5.0)
METHODS = [LORA, lk.LoRA(rank=2, alpha=5.0, dropout=0.2), lk.DoRA(rank=2, alpha=5.0), lk.LoRAFA(rank=2, alpha=5.0)]


@pytest.mark.parametrize("fused", [True, False])
def test_readers_of_one_input_are_one_node_from_the_second_step_on(sizes: list[int], fused: bool) -> None:
    handle = attached(LORA)
    losses(handle, 1, fused)
    assert sizes == [1] * 8
    sizes.clear()
    losses(handle, 2, fused)
    # The fresh optimizer's first forward comes after the step before it.
    assert sizes == [3, 1] * 4


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.model_dump().get('dropout', 0.0)}")
def test_the_losses_are_those_of_the_plain_path(method: lk.Method, checkpointed: bool) -> None:
    found = losses(attached(method, checkpointed))
    with kernels.use("plain"):
        expected = losses(attached(method, checkpointed))
    assert found == pytest.approx(expected, rel=ROUNDING)
    assert found[-1] < found[0]


def test_a_layer_that_is_called_with_something_else_computes_for_itself(sizes: list[int]) -> None:
    handle = attached(LORA)
    losses(handle, 2)
    first = handle.model.blocks[0]
    first.other = torch.randn(3, 5, 12)
    x = torch.randn(3, 5, 12)
    found = handle.model(x)
    with kernels.use("plain"):
        expected = handle.model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    first.other = None
    sizes.clear()
    losses(handle, 1)
    assert 3 in sizes  # the second block's still are one node
    assert sizes[0] < 3  # the first block's are not any more


def test_without_gradients_every_layer_computes_for_itself_as_in_a_model_that_is_loaded_anew(sizes: list[int]) -> None:
    handle = attached(LORA)
    losses(handle, 2)
    sizes.clear()
    with torch.no_grad():
        handle.model(torch.randn(3, 5, 12))
    assert sizes == [1] * 8


def test_the_same_tensor_given_again_is_dropped_by_another_mask() -> None:
    handle = attached(lk.LoRA(rank=2, alpha=5.0, dropout=0.5))
    x = torch.randn(3, 5, 12)
    with torch.no_grad():
        assert not torch.equal(handle.model(x), handle.model(x))


def test_inference_mode_computes_the_same() -> None:
    handle = attached(LORA)
    losses(handle, 2)
    x = torch.randn(3, 5, 12)
    with torch.inference_mode():
        found = handle.model(x)
    with kernels.use("plain"), torch.no_grad():
        torch.testing.assert_close(handle.model(x), found, rtol=0, atol=ROUNDING)


def test_a_copied_model_finds_its_own_readers(sizes: list[int]) -> None:
    handle = attached(LORA)
    losses(handle, 2)
    twin = copy.deepcopy(handle.model)
    x = torch.randn(3, 5, 12)
    sizes.clear()
    with torch.no_grad():
        found = twin(x)
    assert sizes == [1] * 8
    torch.testing.assert_close(found, handle.model(x).detach(), rtol=0, atol=ROUNDING)


def test_an_adapter_that_is_gone_is_no_reader_any_more() -> None:
    handle = attached(LORA)
    losses(handle, 2)
    x = torch.randn(3, 5, 12)
    handle.detach()
    again = lk.attach(handle.model, LORA, ["q", "o"], seed=3)
    with torch.no_grad():
        found = again.model(x)
    with kernels.use("plain"), torch.no_grad():
        torch.testing.assert_close(found, again.model(x), rtol=0, atol=ROUNDING)


class WritesToIt(nn.Module):
    """Writes to a layer's output in place, as some classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def test_dora_whose_output_is_written_to_trains_as_on_the_plain_path() -> None:
    def trained() -> list[float]:
        torch.manual_seed(0)
        return losses(lk.attach(WritesToIt().train(), lk.DoRA(rank=2, alpha=5.0), seed=1))

    found = trained()
    with kernels.use("plain"):
        assert found == pytest.approx(trained(), rel=ROUNDING)


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"full", "head"}))
def test_an_update_says_before_its_terms_whether_they_scale_rows(name: str) -> None:
    handle = lk.attach(Blocks(), {"name": name}, ["q"], seed=1, blank=True)
    hosts = {path: handle.model.get_submodule(path) for path in handle.updates()}
    for path, update in handle.updates().items():
        scales = update.terms(find_ops(hosts[path]), hosts[path]).row_scale is not None
        assert update.scales_rows == scales
