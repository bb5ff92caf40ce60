"""``nn.MultiheadAttention`` with every option of torch's: adapted, merged, routed, trained in full."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import RoutingError, ShapeError

from .models import METHODS, dense_twin, fill_with_noise, method_named, pickled, train_some_steps

SUM_ORDER = 2e-5  # fp32 sums over some ten terms of order 1, in another order
ROWS, LENGTH, SOURCE, EMBED, HEADS = 4, 5, 7, 12, 2


class Attends(nn.Module):
    """An attention and the arguments of its calls; batch first whatever the layer wants."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = layer

    def forward(self, query: Tensor, memory: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        turn = query.dim() == 3 and not self.attn.batch_first
        query = query.transpose(0, 1) if turn else query
        key = value = query
        if memory is not None:
            memory = memory.transpose(0, 1) if turn else memory
            key, value = memory[..., : self.attn.kdim], memory[..., : self.attn.vdim]
        out, weights = self.attn(query, key, value, **kwargs)
        return out.transpose(0, 1) if turn else out, weights


MAKE: dict[str, dict[str, Any]] = {
    "packed": {},
    "sequence first": {"batch_first": False},
    "packed, of another sequence": {"kdim": EMBED},
    "apart": {"kdim": 8, "vdim": 6},
    "apart, sequence first": {"kdim": 8, "vdim": 6, "batch_first": False},
    "odd heads": {"num_heads": 3},
    "without biases": {"bias": False},
    "bias rows": {"add_bias_kv": True},
    "bias rows, apart": {"add_bias_kv": True, "kdim": 8},
    "zero row": {"add_zero_attn": True},
    "dropout": {"dropout": 0.5},
}


def made(name: str, method: str = "lora", **fields: object) -> tuple[Attends, Handle]:
    settings = {"embed_dim": EMBED, "num_heads": HEADS, "batch_first": True, **MAKE[name]}
    model = Attends(nn.MultiheadAttention(**settings)).eval().requires_grad_(False)
    for parameter in model.parameters():  # torch starts the biases at zero, which would hide one left out
        nn.init.normal_(parameter, std=0.4)
    handle = lk.attach(model, method_named(method, **fields), "attn")
    fill_with_noise(handle)
    return model, handle


def inputs(name: str) -> tuple[Tensor, Tensor | None]:
    memory = torch.randn(ROWS, SOURCE, EMBED) if "kdim" in MAKE[name] else None
    return torch.randn(ROWS, LENGTH, EMBED), memory


def by_the_dense_weights(model: Attends, handle: Handle, *args: Any, **kwargs: Any) -> Any:
    """Return what torch's own attention computes with W + delta in the place of every W."""
    return dense_twin(model, handle)(*args, **kwargs)


def assert_close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("method", METHODS)
def test_it_equals_the_dense_truth_merged_and_by_row(method: str, name: str, gradients: bool) -> None:
    model, handle = made(name, method)
    x, memory = inputs(name)
    with torch.set_grad_enabled(gradients):
        truth = by_the_dense_weights(model, handle, x, memory)
        with handle.disabled():
            base = model(x, memory)
        assert (truth[0] - base[0]).abs().max() > 100 * SUM_ORDER
        assert_close(model(x, memory), truth)
        with handle.routed([None, "default", "default", None]):
            mixed = model(x, memory)
        for found, own, expected in zip(mixed, base, truth, strict=True):
            assert torch.equal(found[[0, 3]], own[[0, 3]])
            torch.testing.assert_close(found[[1, 2]], expected[[1, 2]], rtol=0, atol=SUM_ORDER)
        handle.merge()
        assert_close(model(x, memory), truth)


@pytest.mark.parametrize("name", ["packed", "apart", "sequence first"])
def test_an_input_without_a_batch_is_attended_to_and_not_routed(name: str) -> None:
    model, handle = made(name)
    x, memory = inputs(name)
    one = (x[0], None if memory is None else memory[0])
    truth = by_the_dense_weights(model, handle, *one)
    assert_close(model(*one), truth)
    with pytest.raises(RoutingError, match="no batch dimension"), handle.routed(["default"]):
        model(*one)
    handle.merge()
    assert_close(model(*one), truth)


# Masks ----------------------------------------------------------------------------------------------

_HIDDEN = torch.arange(LENGTH)[:, None] < torch.arange(LENGTH)  # who comes later
_PADDED = torch.arange(LENGTH) >= torch.tensor([5, 3, 4, 2])[:, None]
_PAGES = torch.rand(ROWS * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))


def _as_numbers(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


CALLS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding_mask": _PADDED},
    "padding in numbers": {"key_padding_mask": _as_numbers(_PADDED)},
    "a mask": {"attn_mask": _HIDDEN},
    "a mask in numbers": {"attn_mask": _as_numbers(_HIDDEN)},
    "a page for each row and head": {"attn_mask": _PAGES > 0.8},
    "a page in numbers": {"attn_mask": 3 * _PAGES},
    "causal": {"attn_mask": _HIDDEN, "is_causal": True, "need_weights": False},
    "both masks": {"attn_mask": _HIDDEN, "key_padding_mask": _PADDED},
    "pages and padding": {"attn_mask": 3 * _PAGES, "key_padding_mask": _as_numbers(_PADDED)},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["packed", "bias rows"])
def test_every_mask_means_the_same_adapted_merged_and_by_row(name: str, call: str, gradients: bool) -> None:
    model, handle = made(name)
    x, _ = inputs(name)
    with torch.set_grad_enabled(gradients):
        truth = by_the_dense_weights(model, handle, x, **CALLS[call])
        found = model(x, **CALLS[call])
        with handle.routed([None, "default", "default", None]):
            mixed = model(x, **CALLS[call])
        handle.merge()
        merged = model(x, **CALLS[call])
    for place, expected in enumerate(truth):
        if expected is None:
            assert found[place] is mixed[place] is merged[place] is None
            continue
        assert expected.isfinite().all()
        assert_close((found[place], merged[place]), (expected, expected))
        torch.testing.assert_close(mixed[place][[1, 2]], expected[[1, 2]], rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("pages", [ROWS, 1, ROWS * HEADS - 1, HEADS])
def test_pages_that_are_not_one_for_each_row_and_head_are_refused_by_name(pages: int) -> None:
    model, handle = made("packed")
    x, _ = inputs("packed")
    match = rf"attn_mask has shape \({pages}, 5, 5\), which is not one page for each of 4 rows and 2 heads"
    with pytest.raises(RoutingError, match=match), handle.routed([None, "default", None, None]):
        model(x, attn_mask=torch.zeros(pages, LENGTH, LENGTH))


def test_arguments_may_come_by_name_in_any_order() -> None:
    model, handle = made("packed")
    x, _ = inputs("packed")
    expected = model(x, key_padding_mask=_PADDED)[0]
    given = {"key_padding_mask": _PADDED, "value": x, "key": x, "query": x}
    assert torch.equal(model.attn(**given)[0], expected)
    with handle.routed(["default"] * ROWS):
        assert_close((model.attn(**given)[0],), (expected,))
    with handle.routed([None, "default", None, None]):
        assert_close((model.attn(**given)[0][1],), (expected[1],))


def test_a_route_per_position_is_refused_for_rows_attend_as_a_whole() -> None:
    model, handle = made("packed")
    x, _ = inputs("packed")
    expected = model(x)[0]
    with handle.routed([["default"] * LENGTH, *[[None] * LENGTH] * 3]):  # positions that agree are rows
        assert_close((model(x)[0][0],), (expected[0],))
    with pytest.raises(RoutingError, match="4 x 5 rows x positions"), handle.routed([["default", *[None] * 4]] * ROWS):
        model(x)


# Training -------------------------------------------------------------------------------------------


def test_its_own_dropout_acts_in_training_as_it_does_on_the_base() -> None:
    model, handle = made("dropout")
    x, _ = inputs("dropout")
    model.train()
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    expected = by_the_dense_weights(model, handle, x)
    assert_close(found, expected)
    assert not torch.allclose(found[0], model.eval()(x)[0])


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("name", ["packed", "apart"])
def test_its_biases_are_trained_merged_saved_and_routed(name: str, bias: str) -> None:
    targets = "attn" if bias == "lora_only" else "attn.out_proj"
    settings = {"embed_dim": EMBED, "num_heads": HEADS, "batch_first": True, **MAKE[name]}
    model = Attends(nn.MultiheadAttention(**settings)).eval()
    x, memory = inputs(name)
    handle = lk.attach(model, lk.LoRA(rank=2, bias=bias), targets)
    before = handle.digest()
    own = {key: p for key, p in handle.parameters().items() if key.endswith(".bias")}
    rows = ["attn.in_proj_weight"] if name == "packed" else [f"attn.{part}_proj_weight" for part in "qkv"]
    assert set(own) == {f"{path}.bias" for path in (*rows, "attn.out_proj")}
    sum(out.sum() for out in model(x, memory)).backward()
    assert all(p.grad is not None for p in own.values())
    fill_with_noise(handle)
    with torch.no_grad():
        expected = model(x, memory)
        state = handle.state()
        with handle.routed([None, "default", "default", None]):
            assert_close((model(x, memory)[0][[1, 2]],), (expected[0][[1, 2]],))
        handle.merge()
        assert_close(model(x, memory), expected)
        packed = torch.cat([own[f"{row}.bias"].detach() for row in rows])
        torch.testing.assert_close(model.attn.in_proj_bias.detach(), packed)
        handle.unmerge()
        assert handle.digest() == before
        handle.detach()
        Handle(model).add_state(state)
        assert_close(model(x, memory), expected)


@pytest.mark.parametrize("name", ["packed", "apart", "bias rows"])
def test_a_whole_attention_is_trained_in_full_beside_others_mixed_and_routed(name: str) -> None:
    model, handle = made(name)
    x, memory = inputs(name)
    with torch.no_grad():
        with handle.disabled():
            base = model(x, memory)
        model.fc = nn.Linear(3, 3)
        handle.add("whole", lk.LoRA(rank=2), "fc", train_modules="attn")
        assert_close(model(x, memory), base)
        fill_with_noise(handle, "whole")
        with handle.using("default"):
            default = model(x, memory)
        whole = model(x, memory)
        assert (whole[0] - base[0]).abs().max() > 100 * SUM_ORDER
        with handle.routed(["whole", None, "default", "whole"]):
            mixed = model(x, memory)
        for found, first, second, third in zip(mixed, whole, base, default, strict=True):
            torch.testing.assert_close(found[[0, 3]], first[[0, 3]], rtol=0, atol=SUM_ORDER)
            assert torch.equal(found[1], second[1])
            torch.testing.assert_close(found[2], third[2], rtol=0, atol=SUM_ORDER)
        for which in ("whole", {"whole": 0.4}, {"whole": 0.4, "default": 0.7}):
            handle.use(which)
            expected = model(x, memory)
            handle.merge()
            assert_close(model(x, memory), expected)
            handle.unmerge()
            assert_close(model(x, memory), expected)
    handle.use("whole")
    model(x, memory)[0].sum().backward()
    trained = {key for key, p in handle.parameters("whole").items() if p.grad is not None}
    assert {key for key in handle.parameters("whole") if key.startswith("attn.")} <= trained


def test_a_whole_attention_in_fp32_is_trained_on_a_base_of_half_precision() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(EMBED, HEADS, batch_first=True), "fc": nn.Linear(2, 2)})
    model.bfloat16()
    handle = lk.attach(model, lk.LoRA(rank=2), "fc", train_modules="attn")
    x = torch.randn(ROWS, LENGTH, EMBED, dtype=torch.bfloat16)
    out = model["attn"](x, x, x)[0]
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    own = {key: p for key, p in handle.parameters().items() if key.startswith("attn.")}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own.values())


# Beside the computing -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed", "apart"])
@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same_and_is_detached_by_itself(name: str, way: Any) -> None:
    model, handle = made(name)
    x, memory = inputs(name)
    with torch.no_grad():
        expected = model(x, memory)
        clone = way(model)
        assert_close(clone(x, memory), expected)
        other = lk.handle_of(clone)
        assert other is not None
        other.detach()
        with handle.disabled():
            assert torch.equal(clone(x, memory)[0], model(x, memory)[0])
        assert type(clone.attn) is nn.MultiheadAttention
        assert_close(model(x, memory), expected)


def test_the_keys_of_the_base_stay_and_its_parts_have_deltas_of_their_own() -> None:
    model = Attends(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)).eval()
    keys = list(model.state_dict())
    handle = lk.attach(model, lk.LoRA(rank=2), ["attn[q,v]", "out_proj"])
    fill_with_noise(handle)
    assert [key for key in model.state_dict() if "lorakit" not in key] == keys
    assert list(handle.updates()) == ["attn.in_proj_weight[q]", "attn.in_proj_weight[v]", "attn.out_proj"]
    assert [tuple(handle.delta(path).shape) for path in handle.updates()] == [(EMBED, EMBED)] * 3
    assert handle.counts().updates == 3 * 2 * 2 * EMBED
    found = handle.coverage()
    assert (found.reached, found.total) == (3 * EMBED**2, 4 * EMBED**2)
    assert found.unreached == (("attn.in_proj_weight", EMBED**2),)
    weight = model.attn.in_proj_weight.detach().clone()
    q, v = handle.delta("attn.in_proj_weight[q]"), handle.delta("attn.in_proj_weight[v]")
    handle.merge()
    change = model.attn.in_proj_weight.detach() - weight
    torch.testing.assert_close(change, torch.cat([q, torch.zeros(EMBED, EMBED), v]), rtol=0, atol=1e-6)


def test_the_delta_of_an_attention_trained_in_full_is_taken_weight_by_weight() -> None:
    model, handle = made("packed")
    handle.detach()
    model.fc = nn.Linear(3, 3)
    handle = lk.attach(model, lk.LoRA(rank=2), "fc", train_modules="attn")
    fill_with_noise(handle)
    for path, parameter in (("attn.in_proj_weight", "in_proj_weight"), ("attn.out_proj", "out_proj.weight")):
        own = handle.parameters()[f"attn.{parameter}"].detach()
        assert torch.equal(handle.delta(path), own - model.attn.get_parameter(parameter))
    assert handle.coverage().reached == 4 * EMBED**2 + 9


def test_a_rank_above_the_smaller_side_is_refused_for_every_projection() -> None:
    model = Attends(nn.MultiheadAttention(EMBED, HEADS, kdim=8, vdim=6))
    with pytest.raises(ShapeError) as caught:
        lk.attach(model, lk.LoRA(rank=9), "attn")
    message = str(caught.value)
    assert "'attn.k_proj_weight' (12 x 8)" in message
    assert "'attn.v_proj_weight' (12 x 6)" in message
    assert "q_proj_weight" not in message


def test_verify_moves_every_projection_and_finds_one_that_is_never_read() -> None:
    model, handle = made("packed")
    x, _ = inputs("packed")
    assert handle.verify(x).num_sites == 2
    handle.detach()

    class ReadsIt(Attends):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            return nn.functional.linear(query, self.attn.out_proj.weight)

    dead = ReadsIt(model.attn)
    with pytest.raises(lk.errors.VerificationError, match=r"2 of 2 sites.*'attn\.in_proj_weight', 'attn\.out_proj'"):
        lk.attach(dead, lk.LoRA(rank=2), "attn").verify(x)


def test_a_dead_site_is_found_also_where_some_outputs_are_no_numbers() -> None:
    class Beside(Attends):
        def __init__(self, layer: nn.MultiheadAttention) -> None:
            super().__init__(layer)
            self.dead = nn.Linear(4, 5)

    model = Beside(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    x = torch.randn(ROWS, LENGTH, EMBED)
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[2] = True  # a row that may attend to nothing has no mean
    assert model(x, key_padding_mask=padding)[0][2].isnan().all()
    handle = lk.attach(model, lk.LoRA(rank=2))
    with pytest.raises(lk.errors.VerificationError, match="1 of 3 sites do not move the output: 'dead'"):
        handle.verify(x, key_padding_mask=padding)


def test_training_learns_and_leaves_the_base() -> None:
    class First(Attends):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(query)[0]

    model = First(nn.MultiheadAttention(EMBED, HEADS, batch_first=True))
    handle = lk.attach(model, lk.DoRA(rank=2), "attn")
    before, x = handle.digest(), torch.randn(ROWS, LENGTH, EMBED)
    start = {key: p.detach().clone() for key, p in handle.parameters().items()}
    train_some_steps(model, handle, x)
    assert handle.digest() == before
    assert all(not torch.equal(p, start[key]) for key, p in handle.parameters().items())
