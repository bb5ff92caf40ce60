"""The adapted linear layer as an operation of the compiler's graph: what the node computes, declared as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.kernels import compiled
from lorakit.kernels.compiled import compiled_linear
from lorakit.kernels.linear import Linear, Pair, adapted_linears

SEED = 12345
RANK, D_IN, D_OUT = 3, 7, 5


@pytest.fixture(autouse=True)
def _one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "draw_seed", lambda: SEED)


def case(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, Linear]:
    """Return an input and a layer, all of which take gradients but the weight."""
    torch.manual_seed(0)
    A, B = torch.randn(RANK, D_IN, dtype=dtype), torch.randn(D_OUT, RANK, dtype=dtype)
    x, b = torch.randn(2, 4, D_IN, dtype=dtype).requires_grad_(), torch.randn(D_OUT, dtype=dtype).requires_grad_()
    pair = Pair(A.requires_grad_(), B.requires_grad_(), 1.5)
    return x, Linear(torch.randn(D_OUT, D_IN, dtype=dtype), b if bias else None, [pair])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_stands_the_check_in_float64(p: float, bias: bool) -> None:
    x, layer = case(bias=bias)

    def run(x: Tensor, A: Tensor, B: Tensor, *b: Tensor) -> Tensor:
        return compiled_linear(x, Linear(layer.W, b[0] if b else None, [Pair(A, B, 1.5)]), p)

    pair = layer.pairs[0]
    assert torch.autograd.gradcheck(run, (x, pair.A, pair.B, *([layer.bias] if bias else [])))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_bits_of_the_node(p: float, dtype: torch.dtype) -> None:
    x, layer = case(dtype)
    wide = Pair(*(t.detach().float().requires_grad_() for t in layer.pairs[0][:2]), 1.5)  # an adapter in fp32
    layer = layer._replace(pairs=[wide])
    trained = [x, wide.A, wide.B, layer.bias]
    found, expected = compiled_linear(x, layer, p), adapted_linears(x, [layer], p, SEED)[0]
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(y, trained, upstream) for y in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("trained", ["A", "B", "x"])
def test_what_takes_no_gradient_is_neither_kept_nor_computed(trained: str) -> None:
    x, layer = case(bias=False)
    tensors = {"x": x, "A": layer.pairs[0].A, "B": layer.pairs[0].B}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = compiled_linear(x, layer, 0.0)
    expected = adapted_linears(x, [layer])[0]
    (found,), (same,) = (torch.autograd.grad(y.sum(), [tensors[trained]]) for y in (out, expected))
    assert torch.equal(found, same)
    assert (tuple(x.shape) in kept) == (trained == "A")
    assert ((8, RANK) in kept) == (trained == "B")


def test_the_compiler_may_take_the_operations_as_they_are_declared() -> None:
    x, layer = case(torch.float32)
    A, B, _ = layer.pairs[0]
    torch.library.opcheck(compiled._forward, (x, layer.W, layer.bias, A, B, 1.5, 0.3))
    grad, H, seed = torch.randn(2, 4, D_OUT), torch.randn(8, RANK), torch.tensor(SEED)
    given: tuple[Any, ...] = (grad, x, H, layer.W, A, B, 1.5, 0.3, seed)
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    for needs in ([True] * 4, [False, False, True, False]):
        torch.library.opcheck(compiled._backward, (*detached, needs), test_utils=("test_schema", "test_faketensor"))


def test_lengths_stay_open_in_the_compilers_graph() -> None:
    _, layer = case(torch.float32)
    graphs: list[Any] = []

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph

    run = torch.compile(lambda x: compiled_linear(x, layer, 0.0).sum(), backend=backend, dynamic=True, fullgraph=True)
    for rows, length in ((2, 4), (3, 9), (5, 17)):
        x = torch.randn(rows, length, D_IN)
        assert torch.equal(run(x), adapted_linears(x, [layer])[0].sum())
    assert len(graphs) == 1


def test_the_compilers_graph_has_the_operation_and_what_is_exported_does_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    lk.attach(model, lk.LoRA(rank=2, alpha=8), "all-linear", seed=0)
    x, graphs = torch.randn(3, 8), []

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph

    def operations(graph: Any) -> list[str]:
        return [str(node.target) for node in graph.graph.nodes]

    expected = model(x)
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    assert operations(graphs[0]).count("lorakit.adapted_linear.default") == 2
    exported = torch.export.export(model, (x,))
    assert not any("adapted_linear" in operation for operation in operations(exported))
    torch.testing.assert_close(exported.module()(x), expected)
