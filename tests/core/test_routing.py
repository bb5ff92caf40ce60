"""Another adapter per row, or per position, of one batch; what cannot be told is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import AdapterError, MergeError, RoutingError

from .models import KINDS, Tower, fill_with_noise, one_layer, tokens_for

Build = Callable[..., nn.Module]
# The base's own matmul sums in another order for another batch shape: some ulps of values of order 1 to 10.
BATCH_SHAPE = 2e-5


@pytest.fixture
def pair() -> tuple[Tower, Handle, Tensor]:
    model = Tower().eval()
    handle = lk.attach(model, lk.LoRA(rank=3, alpha=5), "all-linear,embed", name="a")
    fill_with_noise(handle, "a")
    handle.add("b", lk.DoRA(rank=2, alpha=3), "up,embed", train_modules="head")
    fill_with_noise(handle, "b")
    return model, handle, tokens_for()


def alone(model: nn.Module, handle: Handle, name: str | None, inputs: Tensor) -> Tensor:
    with handle.using(name):
        return model(inputs)


def test_each_row_has_its_own_adapter(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    route = ["b", None, "a", "b"]
    with handle.routed(route):
        mixed = model(tokens)
    for row, name in enumerate(route):
        expected = alone(model, handle, name, tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=BATCH_SHAPE)


def test_each_position_has_its_own_adapter(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair  # the model mixes no positions, so that each can be looked at by itself
    names: list[str | None] = ["a", None, "b"]
    route = [[names[(row + 2 * place) % 3] for place in range(6)] for row in range(4)]
    with handle.routed(route):
        mixed = model(tokens)
    for name in names:
        expected = alone(model, handle, name, tokens)
        mine = torch.tensor([[entry == name for entry in row] for row in route])
        torch.testing.assert_close(mixed[mine], expected[mine], rtol=0, atol=BATCH_SHAPE)


def test_positions_of_the_base_have_the_bases_bits(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    route = [["a", None, "b", None, None, "a"]] * 4
    with handle.routed(route):
        mixed = model(tokens)
    assert torch.equal(mixed[:, [1, 3, 4]], alone(model, handle, None, tokens)[:, [1, 3, 4]])


def test_positions_that_agree_per_row_are_rows(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    with handle.routed(["a", "b", None, "a"]):
        by_row = model(tokens)
    with handle.routed([["a"] * 6, ["b"] * 6, [None] * 6, ["a"] * 6]):
        assert torch.equal(model(tokens), by_row)


def test_packed_positions_are_found_in_a_flattened_input(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    route = [["a", "a", "b", "b", None, None]] * 4
    with handle.routed(route):
        by_batch = model(tokens)
        flat = model(tokens.flatten())
    torch.testing.assert_close(flat, by_batch.flatten(0, 1), rtol=0, atol=BATCH_SHAPE)


def test_a_route_of_the_base_alone_is_the_base(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    with handle.routed([None] * 4):
        assert torch.equal(model(tokens), alone(model, handle, None, tokens))


def test_routes_nest_and_restore(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use("a")
    out = model(tokens)
    with handle.routed(["b"] * 4):
        outer = model(tokens)
        with handle.routed(["a", "b", "a", "b"]):
            assert not torch.equal(model(tokens), outer)
            with handle.disabled():
                assert torch.equal(model(tokens), alone(model, handle, None, tokens))
        assert torch.equal(model(tokens), outer)
    with pytest.raises(RoutingError), handle.routed(["b"] * 3):
        model(tokens)
    assert torch.equal(model(tokens), out)


def test_only_the_rows_adapters_get_gradients(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    with handle.routed(["b", None, "b", None]):
        model(tokens).square().mean().backward()
    assert all(p.grad is None for p in handle.parameters("a").values())
    assert all(p.grad is not None for p in handle.parameters("b").values())


def test_a_mixed_batch_gives_each_adapter_the_gradient_of_its_rows(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    with handle.routed(["a", "b", "a", None]):
        model(tokens).square().sum().backward()
    mixed = {key: p.grad for key, p in handle.parameters("a").items()}
    model.zero_grad()
    alone(model, handle, "a", tokens[[0, 2]]).square().sum().backward()
    for key, parameter in handle.parameters("a").items():
        torch.testing.assert_close(mixed[key], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_gives_the_gradient_of_its_rows_on_every_kind_of_layer(kind: str) -> None:
    model = one_layer(kind)
    handle = lk.attach(model, lk.DoRA(rank=3, alpha=5), KINDS[kind].target)
    fill_with_noise(handle)
    x = KINDS[kind].inputs(4)
    with handle.routed(["default", None, "default", None]):
        model(x).sum().backward()
    mixed = {key: p.grad for key, p in handle.parameters().items()}
    model.zero_grad()
    model(x[[0, 2]]).sum().backward()
    for key, parameter in handle.parameters().items():
        assert parameter.grad is not None
        bound = 1e-5 * max(1.0, float(parameter.grad.abs().max()))  # fp32 sums over rows in another order
        torch.testing.assert_close(mixed[key], parameter.grad, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_rows_of_a_real_model_are_those_alone(build: Build, tokens: Tensor, name: str) -> None:
    model = build(name)
    handle = lk.attach(model, lk.LoRA(rank=3, alpha=5), name="a")
    handle.add("b", lk.LoRA(rank=2), "attention", train_modules="classifier" if name == "bert" else ())
    fill_with_noise(handle, "a")
    fill_with_noise(handle, "b")
    route = ["a", "b", None, "a"]
    with handle.routed(route), torch.no_grad():
        mixed = model(tokens).logits
    for row, adapter in enumerate(route):
        with handle.using(adapter), torch.no_grad():
            expected = model(tokens[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=BATCH_SHAPE)


# Refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "route",
    [["a", "b", "a"], ["a"] * 5, [["a", "b"]] * 4, [["a", "b", "a", "b", "a", "b"]] * 3],
    ids=["too few rows", "too many rows", "too few positions", "too few rows of positions"],
)
def test_a_route_for_another_batch_is_refused(pair: tuple[Tower, Handle, Tensor], route: list[str]) -> None:
    model, handle, tokens = pair
    with handle.routed(route), pytest.raises(RoutingError, match="whose they are cannot be told"):
        model(tokens)


@pytest.mark.parametrize("route", [[], [["a", "b"], ["a"]], [["a", "b"], "a"], [[], []]])
def test_a_route_that_is_no_batch_is_refused(pair: tuple[Tower, Handle, Tensor], route: list[str]) -> None:
    _, handle, _ = pair
    with pytest.raises(RoutingError), handle.routed(route):
        pass


def test_a_route_given_as_one_name_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with pytest.raises(RoutingError), handle.routed("a"):
        pass


def test_unknown_names_in_a_route_are_all_named(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with pytest.raises(AdapterError) as caught, handle.routed(["a", "x", None, "y"]):
        pass
    assert "'x'" in str(caught.value)
    assert "'y'" in str(caught.value)


def test_rows_routed_through_a_layer_without_the_batch_are_refused(build: Build, tokens: Tensor) -> None:
    model = build("gpt2")  # its position embedding runs once for all rows
    handle = lk.attach(model, lk.LoRA(rank=2), "wpe")
    with handle.routed(["default", None, None, None]), pytest.raises(RoutingError, match="1 x 6"):
        model(tokens)


def test_positions_seen_by_a_layer_that_keeps_one_of_each_row_are_refused(build: Build, tokens: Tensor) -> None:
    model = build("bert")  # its pooler sees the first token only
    handle = lk.attach(model, lk.LoRA(rank=2), "pooler.dense")
    with handle.routed([["default", None] * 3] * 4), pytest.raises(RoutingError):
        model(tokens)


def test_merging_while_rows_are_routed_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with handle.routed(["a"] * 4), pytest.raises(MergeError, match="routed"):
        handle.merge("a")


def test_routing_while_merged_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    handle.merge("a")
    with pytest.raises(MergeError, match="cannot route rows"), handle.routed(["a"] * 4):
        pass
