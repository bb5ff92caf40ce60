"""Which adapters act, and how strongly: none, one, several added up with weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import AdapterError
from lorakit.layers import Site

from .models import KINDS, ROWS, Tower, cells_of, fill_with_noise, method_named, one_layer, tokens_for

# Sums of the same fp32 terms in another order, see test_contract.
SUM_ORDER = 2e-5


@pytest.fixture
def pair() -> tuple[Tower, Handle, Tensor]:
    """Return a model with the adapters 'a' and 'b', as if trained, and tokens."""
    model = Tower().eval()
    handle = lk.attach(model, lk.LoRA(rank=3, alpha=5), name="a")
    fill_with_noise(handle, "a")
    handle.add("b", lk.DoRA(rank=2, alpha=3), "up,embed")
    fill_with_noise(handle, "b")
    return model, handle, tokens_for()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("method", "kind"), cells_of(KINDS))
@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.3, "b": -1.5}, {"b": 2.0}])
def test_several_adapters_are_the_weighted_sum_of_their_deltas(
    method: str, kind: str, weights: dict[str, float]
) -> None:
    model = one_layer(kind).eval()
    handle = Handle(model)
    for name in ("a", "b"):
        handle.add(name, method_named(method), KINDS[kind].target)
        fill_with_noise(handle, name)
    handle.use(weights)
    x = KINDS[kind].inputs(ROWS)
    dense_weights: dict[str, Tensor] = {}
    for site in (Site.at(model, path) for path in handle.updates("a")):
        change = sum(weight * handle.delta(site.path, name) for name, weight in weights.items())
        name = f"layer.{site.ops.parameter}"
        base = dense_weights.get(name, site.ops.weight(model.layer).detach())
        dense_weights[name] = base + site.ops.as_weight(model.layer, change)
    out = model(x)
    with handle.disabled():
        dense = torch.func.functional_call(model, dense_weights, (x,))
    torch.testing.assert_close(out, dense, rtol=0, atol=SUM_ORDER)


def test_a_list_of_names_adds_each_at_strength_1(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use(["a", "b"])
    listed = model(tokens)
    handle.use({"a": 1, "b": 1})
    assert torch.equal(model(tokens), listed)


def test_none_is_the_base_bit_for_bit(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use(None)
    chosen = model(tokens)
    handle.detach()
    assert torch.equal(chosen, model(tokens))


def test_a_new_adapter_is_the_only_one_that_acts(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    assert handle.active.weights == {"b": 1.0}


def test_blocks_restore_what_acted_before_also_nested_and_after_an_error(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use({"a": 0.5})
    out = model(tokens)
    with handle.using("b"):
        with handle.disabled():
            with handle.using(["a", "b"]):
                assert handle.active.weights == {"a": 1.0, "b": 1.0}
            assert handle.active.weights == {}
        assert handle.active.weights == {"b": 1.0}
    with pytest.raises(ZeroDivisionError), handle.disabled():
        _ = 1 / 0
    assert torch.equal(model(tokens), out)


def test_an_unknown_name_changes_nothing(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    handle.use("a")
    with pytest.raises(AdapterError), handle.using(["b", "c"]):
        pass
    assert handle.active.weights == {"a": 1.0}


def test_a_strength_scales_the_update_and_lasts(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use({"a": 0.5})
    half = model(tokens)
    handle.use("a")
    handle.strengthen("a", 0.5)
    assert torch.equal(model(tokens), half)
    handle.use("b")
    handle.use("a")
    assert torch.equal(model(tokens), half)


def test_strength_0_is_the_base_bit_for_bit(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    with handle.disabled():
        base = model(tokens)
    handle.strengthen("b", 0.0)
    assert torch.equal(model(tokens), base)


def test_strength_minus_1_reverses_one_layers_update() -> None:
    model = one_layer("linear").eval()
    handle = lk.attach(model, lk.LoRA(rank=3), "layer")
    fill_with_noise(handle)
    x = torch.randn(4, 6)
    with handle.disabled():
        base = model(x)
    there = model(x) - base
    handle.strengthen("default", -1.0)
    torch.testing.assert_close(model(x) - base, -there, rtol=0, atol=SUM_ORDER)


def test_a_strength_acts_in_a_merge_and_on_routed_rows(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use("a")
    handle.strengthen("a", 0.25)
    out = model(tokens)
    with handle.routed(["a"] * ROWS):
        torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)
    handle.merge()
    torch.testing.assert_close(model(tokens), out, rtol=0, atol=SUM_ORDER)


def test_the_strength_of_a_removed_adapter_is_forgotten(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    handle.strengthen("a", 0.0)
    handle.remove("a")
    handle.add("a", lk.LoRA(rank=2))
    assert handle.active.strength("a") == 1.0


def test_several_adapters_train_at_once(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.use(["a", "b"])
    model(tokens).square().mean().backward()
    for name in ("a", "b"):
        assert all(p.grad is not None and p.grad.any() for p in handle.parameters(name).values())


def test_an_adapter_that_is_not_trainable_gets_no_gradients(pair: tuple[Tower, Handle, Tensor]) -> None:
    model, handle, tokens = pair
    handle.trainable("a", False)
    handle.use(["a", "b"])
    model(tokens).square().mean().backward()
    assert all(p.grad is None for p in handle.parameters("a").values())
    assert all(p.grad is not None for p in handle.parameters("b").values())


def test_counts_are_the_numbers_that_are_there(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    a, b = handle.counts("a"), handle.counts("b")
    # a: rank 3 on two blocks (8 x 16 and 16 x 8) and the head (13 x 8); b: rank 2 with magnitudes on up and embed
    assert a.trained == 2 * 2 * 3 * (8 + 16) + 3 * (13 + 8)
    assert b.trained == 2 * (2 * (8 + 16) + 16) + 2 * (13 + 8) + 8
    assert a.base == sum(p.numel() for p in Tower().parameters())
    assert a.percent == pytest.approx(100 * a.trained / a.base)
    assert sum(p.numel() for p in handle.parameters("a").values()) == a.trained


def test_an_update_is_shown_with_rank_and_scale() -> None:
    model = one_layer("linear")
    lk.attach(model, lk.LoRA(rank=3, alpha=6), "layer")
    assert "rank=3, scale=2, dropout=0" in repr(model)


def test_a_delta_of_a_layer_without_an_update_is_refused(pair: tuple[Tower, Handle, Tensor]) -> None:
    _, handle, _ = pair
    with pytest.raises(AdapterError, match=r"adapter 'b' has no update at 'blocks\.0\.down'"):
        handle.delta("blocks.0.down", "b")


def test_inputs_may_come_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = ByKeyword().eval()
    handle = lk.attach(model, lk.LoRA(rank=2), "layer")
    fill_with_noise(handle)
    x = torch.randn(3, 6)
    expected = model.layer(x)
    assert torch.equal(model(x), expected)
    with handle.routed(["default"] * 3):
        torch.testing.assert_close(model(x), expected)
