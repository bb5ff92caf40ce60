"""DoRA against its formulas: norm, gradients, and the one thing that LoRA of the same rank cannot fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.layers import Site
from lorakit.methods.dora import DoRAUpdate

from .models import KINDS, OneLayer, fill_with_noise, float_inputs, one_layer, sites_of_kind

# The factors' norm and the row scale are fp32: a few ulps of 1.2e-7.
FP32_NORM = 1e-6


def noisy(kind: str, dtype: torch.dtype = torch.float32) -> tuple[OneLayer, Handle, list[Site]]:
    model = one_layer(kind, dtype)
    handle = lk.attach(model, lk.DoRA(rank=3, alpha=5), KINDS[kind].target, dtype=dtype)
    fill_with_noise(handle)
    return model, handle, sites_of_kind(model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_without_a_dense_temporary_equals_the_dense_norm(kind: str) -> None:
    _, handle, sites = noisy(kind)
    for site in sites:
        update = handle.updates()[site.path]
        assert isinstance(update, DoRAUpdate)
        A, B = update.get_parameter("A").double(), update.get_parameter("B").double()
        dense = torch.linalg.vector_norm(site.matrix().double() + 5 / 3 * B @ A, dim=-1)
        found = update.norm(site.matrix(), *update.factors()).double()
        torch.testing.assert_close(found, dense, rtol=FP32_NORM, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_magnitude_starts_as_the_rows_norm(kind: str) -> None:
    model = one_layer(kind)
    handle = lk.attach(model, lk.DoRA(rank=3), KINDS[kind].target)
    for site in sites_of_kind(model, kind):
        expected = torch.linalg.vector_norm(site.matrix(), dim=-1)
        torch.testing.assert_close(handle.parameters()[f"{site.path}.magnitude"].detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_rows_have_the_magnitudes_as_norm(kind: str) -> None:
    model, handle, sites = noisy(kind)
    magnitudes = {site.path: handle.parameters()[f"{site.path}.magnitude"].detach().clone() for site in sites}
    handle.merge()
    for site in sites:
        norms = torch.linalg.vector_norm(site.matrix(), dim=-1)
        torch.testing.assert_close(norms, magnitudes[site.path].abs(), rtol=1e-5, atol=1e-6)
        assert model.layer is site.layer


def gradients_at_the_merged_weights(
    model: OneLayer, handle: Handle, x: Tensor, goal: Tensor, sites: list[Site]
) -> dict[str, Tensor]:
    """Return G = dL/dW' as a matrix of each site, by a plain model that holds the merged weights."""
    weights: dict[str, Tensor] = {}
    for site in sites:
        name = f"layer.{site.ops.parameter}"
        base = weights.get(name, site.ops.weight(site.layer).detach())
        weights[name] = base + site.ops.as_weight(site.layer, handle.delta(site.path))
    weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    with handle.disabled():
        (torch.func.functional_call(model, weights, (x,)) * goal).sum().backward()
    found = {}
    for site in sites:
        gradient = weights[f"layer.{site.ops.parameter}"].grad
        assert gradient is not None
        found[site.path] = site.ops.as_matrix(site.layer, gradient)
    return found


# torch gives a padding token's row of the table no gradient, however it is used.
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("embedding with padding", "embedding scaled")])
def test_gradients_are_those_through_c_times_g_with_the_norm_held_constant(kind: str) -> None:
    model, handle, sites = noisy(kind, torch.float64)
    x = float_inputs(KINDS[kind].inputs(4), torch.float64)
    out = model(x)
    goal = torch.randn_like(out)
    (out * goal).sum().backward()
    own, scale = handle.parameters(), 5 / 3
    dense = gradients_at_the_merged_weights(model, handle, x, goal, sites)
    for site in sites:
        A, B, m = (own[f"{site.path}.{name}"].detach() for name in ("A", "B", "magnitude"))
        V = site.matrix() + scale * B @ A
        norm = torch.linalg.vector_norm(V, dim=-1)
        G = dense[site.path]
        cG = (m / norm)[..., None] * G
        expected = {"A": scale * B.mT @ cG, "B": scale * cG @ A.mT, "magnitude": (G * V).sum(dim=-1) / norm}
        for name, gradient in expected.items():
            found = own[f"{site.path}.{name}"].grad
            torch.testing.assert_close(found, gradient, rtol=FP32_NORM, atol=FP32_NORM * float(gradient.abs().max()))


def test_a_rescaling_of_the_rows_is_fitted_at_rank_1_ten_times_better_than_by_lora() -> None:
    base = nn.Linear(12, 16, bias=False)
    with torch.no_grad():
        goal = (0.5 + torch.arange(16) / 10)[:, None] * base.weight
    x = torch.randn(64, 12)

    def fitted(method: lk.Method) -> float:
        model = OneLayer(nn.Linear(12, 16, bias=False))
        model.load_state_dict({"layer.weight": base.weight})
        handle = lk.attach(model, method, "layer", seed=0)
        optimizer = torch.optim.Adam(handle.parameters().values(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(x) - x @ goal.t()).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert fitted(lk.DoRA(rank=1, alpha=1)) <= 0.1 * fitted(lk.LoRA(rank=1, alpha=1))


def test_a_row_of_zeros_gives_no_nan() -> None:
    model = OneLayer(nn.Linear(6, 10))
    with torch.no_grad():
        model.layer.get_parameter("weight")[4] = 0.0
    x = torch.randn(3, 6)
    before = model(x)
    handle = lk.attach(model, lk.DoRA(rank=3), "layer")
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in handle.parameters().values())


def test_dropout_never_touches_what_the_magnitude_does_to_the_base() -> None:
    model = OneLayer(nn.Linear(6, 10))
    handle = lk.attach(model, lk.DoRA(rank=3, dropout=0.5), "layer")
    with torch.no_grad():
        handle.parameters()["layer.magnitude"].mul_(2.0)  # B = 0: only the base's product is rescaled
    x = torch.randn(4, 6)
    assert torch.equal(model.train()(x), model.eval()(x))
