"""An adapter in fp32 on a base of another dtype, under autocast, and dropout in training."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ConfigError

from .models import (
    BRANCHES,
    KINDS,
    METHODS,
    ROWS,
    WEIGHTS,
    OneLayer,
    cells_of,
    fill_with_noise,
    float_inputs,
    method_named,
    one_layer,
    sites_of_kind,
    train_some_steps,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Values rounded to the base's dtype on the way from x to y, each at most eps/2 of the magnitude below:
# merged: the weight and the product; unmerged: W x, A, A x, B, B A x, the sum, and with a row scale also
# the product less the bias, the gain, their product and the difference. Twelve halves are six eps; two
# more for the sums of fp32 parts.
ROUNDINGS = 8.0
# torch says so of every projected LSTM on a CPU
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def magnitude(model: OneLayer, handle: Handle, x: Tensor, kind: str) -> float:
    """Return the largest sum of absolute terms that makes up an output: |W| |x| + |s| |B| |A| |x| + |b|."""
    plain = copy.deepcopy(model)
    handle_of_copy = lk.handle_of(plain)
    assert handle_of_copy is not None
    plain = handle_of_copy.detach().float()
    weight = plain.get_parameter("layer.weight")
    for site in sites_of_kind(model, kind):
        terms = handle.updates()[site.path].terms(site.ops, site.layer)
        A, B = terms.low_rank()
        gain = torch.ones(()) if terms.row_scale is None else terms.row_scale.detach().abs().clamp_min(1.0)[:, None]
        more = gain * (B.abs() @ A.abs()) + (gain - 1) * site.matrix().float().abs()
        with torch.no_grad():
            weight.abs_().add_(site.ops.as_weight(plain.get_submodule("layer"), more))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.abs_()
        return float(plain(x.float().abs() if x.is_floating_point() else x).max())


def noisy(method: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[OneLayer, Handle, Tensor]:
    model = one_layer(kind, dtype).eval()
    handle = lk.attach(model, method_named(method), KINDS[kind].target)
    fill_with_noise(handle)
    return model, handle, float_inputs(KINDS[kind].inputs(ROWS), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "kind"), cells_of(BRANCHES))
def test_merged_equals_unmerged_within_the_bases_rounding(method: str, kind: str, dtype: torch.dtype) -> None:
    model, handle, x = noisy(method, kind, dtype)
    assert {p.dtype for p in handle.parameters().values()} == {torch.float32}
    unmerged, bound = model(x), ROUNDINGS * torch.finfo(dtype).eps * magnitude(model, handle, x, kind)
    before = handle.digest()
    handle.merge()
    merged = model(x)
    assert merged.dtype == unmerged.dtype == dtype
    torch.testing.assert_close(merged.float(), unmerged.float(), rtol=0, atol=bound)
    handle.unmerge()
    assert handle.digest() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "kind"), cells_of(WEIGHTS))
@torch.no_grad()
def test_a_layer_that_runs_with_other_weights_has_the_merged_ones_bits(
    method: str, kind: str, dtype: torch.dtype
) -> None:
    model, handle, x = noisy(method, kind, dtype)
    unmerged, before = model(x), handle.digest()
    with handle.disabled():
        assert not torch.equal(model(x), unmerged)
    handle.merge()
    merged = model(x)
    assert merged.dtype == dtype
    assert torch.equal(merged, unmerged)
    handle.unmerge()
    assert handle.digest() == before
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "kind"), cells_of(KINDS))
@torch.no_grad()
def test_step_0_is_unchanged_on_every_dtype(method: str, kind: str, dtype: torch.dtype) -> None:
    model = one_layer(kind, dtype).eval()
    x = float_inputs(KINDS[kind].inputs(ROWS), dtype)
    before = model(x)
    lk.attach(model, method_named(method), KINDS[kind].target)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "kind"), cells_of(KINDS))
def test_gradients_are_fp32_on_a_base_of_any_dtype(method: str, kind: str, dtype: torch.dtype) -> None:
    model, handle, x = noisy(method, kind, dtype)
    model.train()(x).float().square().mean().backward()
    for parameter in handle.parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("method", "kind"), cells_of(BRANCHES))
def test_merged_equals_unmerged_under_autocast(method: str, kind: str) -> None:
    model, handle, x = noisy(method, kind)
    bound = ROUNDINGS * torch.finfo(torch.bfloat16).eps * magnitude(model, handle, x, kind)
    with torch.autocast("cpu", torch.bfloat16):
        with handle.disabled():
            dtype = model(x).dtype
        unmerged = model(x)
        handle.merge()
        merged = model(x)
    assert merged.dtype == unmerged.dtype == dtype
    torch.testing.assert_close(merged.float(), unmerged.float(), rtol=0, atol=bound)


@pytest.mark.parametrize(("method", "kind"), cells_of(WEIGHTS))
@torch.no_grad()
def test_a_layer_that_runs_with_other_weights_has_the_merged_ones_bits_under_autocast(method: str, kind: str) -> None:
    model, handle, x = noisy(method, kind)
    with torch.autocast("cpu", torch.bfloat16):
        unmerged = model(x)
    handle.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize(("method", "kind"), cells_of(KINDS))
def test_training_under_autocast_gives_fp32_gradients_and_leaves_the_base(method: str, kind: str) -> None:
    model = one_layer(kind)
    handle = lk.attach(model, method_named(method), KINDS[kind].target)
    before = handle.digest()
    with torch.autocast("cpu", torch.bfloat16):
        train_some_steps(model, handle, KINDS[kind].inputs(ROWS))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.parameters().values())
    assert handle.digest() == before


@pytest.mark.parametrize(("method", "kind"), cells_of(KINDS))
def test_a_merged_weight_is_the_same_under_autocast(method: str, kind: str) -> None:
    model, handle, _ = noisy(method, kind)
    handle.merge()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lorakit" not in name}
    handle.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        handle.merge()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_the_dtype_asked_for(method: str, adapter_dtype: torch.dtype) -> None:
    handle = lk.attach(one_layer("linear"), method_named(method), "layer", dtype=adapter_dtype)
    assert {p.dtype for p in handle.parameters().values()} == {adapter_dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merged_weight_is_the_fp32_sum_rounded_once(dtype: torch.dtype) -> None:
    model = one_layer("linear").to(dtype)
    handle = lk.attach(model, lk.LoRA(rank=3), "layer")
    fill_with_noise(handle)
    weight = model.layer.get_parameter("weight").detach()
    expected = (weight.float() + handle.delta("layer")).to(dtype)
    handle.merge()
    assert torch.equal(model.layer.get_parameter("weight"), expected)


# Dropout --------------------------------------------------------------------------------------------


def dropped(method: str, kind: str, p: float = 0.5) -> tuple[OneLayer, Handle]:
    model = one_layer(kind).eval()
    handle = lk.attach(model, method_named(method, dropout=p), KINDS[kind].target)
    fill_with_noise(handle)
    return model, handle


@pytest.mark.parametrize(("method", "kind"), cells_of(BRANCHES))
def test_dropout_acts_in_training_only_and_merging_equals_evaluation(method: str, kind: str) -> None:
    model, handle = dropped(method, kind)
    x = KINDS[kind].inputs(ROWS)
    evaluated = model(x)
    assert torch.equal(model(x), evaluated)
    model.train()
    assert not torch.equal(model(x), evaluated)
    model.eval()
    handle.merge()
    torch.testing.assert_close(model(x), evaluated, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_dropout_is_refused_by_name_where_an_updates_own_input_cannot_be_dropped(kind: str) -> None:
    model = one_layer(kind)
    path = sites_of_kind(model, kind)[0].path
    with pytest.raises(ConfigError, match=rf"dropout.*'{re.escape(path)}'"):
        lk.attach(model, lk.LoRA(rank=3, dropout=0.1), KINDS[kind].target)
    assert lk.handle_of(model) is None


@pytest.mark.parametrize(("method", "kind"), cells_of(["linear", "embedding", "transposed"]))
def test_the_mean_over_many_draws_of_dropout_is_the_undropped_update(method: str, kind: str) -> None:
    model, _ = dropped(method, kind)
    draws = 20_000
    row = KINDS[kind].inputs(1).flatten(0, 1)[:1]
    evaluated = model(row)
    model.train()
    sample = model(row.expand(draws, *row.shape[1:])).detach()
    standard_error = sample.std(dim=0).clamp_min(1e-6) / math.sqrt(draws)
    # Five standard errors: about one false alarm in a million outputs.
    assert ((sample.mean(dim=0) - evaluated[0]).abs() < 5 * standard_error).all()


def test_dropout_on_an_embedding_keeps_or_drops_a_tokens_whole_update() -> None:
    model, handle = dropped("lora", "embedding", p=0.25)
    tokens = torch.full((400,), 7)
    with handle.disabled():
        base = model(tokens)
    update = model(tokens[:1]) - base[:1]
    model.train()
    share = ((model(tokens) - base) / update).detach()
    torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=0, atol=1e-4)
    kept = share[:, 0] > 0.5
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / 0.75), rtol=0, atol=1e-4)
    assert 0.6 < kept.float().mean() < 0.9


def test_dropout_leaves_the_base_part_alone() -> None:
    model = OneLayer(nn.Linear(6, 10))
    lk.attach(model, lk.LoRA(rank=3, dropout=0.9), "layer")
    x = torch.randn(5, 6)
    assert torch.equal(model.train()(x), model.eval()(x))  # B = 0: only the low-rank branch is dropped
