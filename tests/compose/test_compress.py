"""Cutting adapters: what is kept, what that costs, and that the figures are true."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import AdapterState, Handle, SiteState
from lorakit.compose.compress import Compressed, compress
from lorakit.compose.selection import KeepEnergy, KeepNumbers, KeepRank, Selection
from lorakit.errors import ConfigError, InputError, UnsupportedLayerError
from lorakit.formats import read_adapter
from lorakit.formats.store import write_adapter
from lorakit.methods import find_method

# What is predicted is a sum of fp64 squares; what is measured is of pairs stored in fp32.
ERROR = 1e-5
# The dense products of fp32 factors.
DENSE = 1e-5


def pair(d_out: int, d_in: int, values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return factors of a matrix with these singular values, unevenly divided between them."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d_out, len(values), generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(d_in, len(values), generator=generator).double()).Q
    mix = torch.randn(len(values), len(values), generator=generator).double()
    A = torch.linalg.solve(mix, torch.diag(torch.tensor(values).double()) @ right.mT)
    return A.float(), (left @ mix).float()


def state_of(layers: Mapping[str, tuple[Tensor, Tensor]], method: lk.LoRA | None = None, **more: Any) -> AdapterState:
    method = method or lk.LoRA(rank=4, alpha=4.0)
    sites = {
        path: SiteState("linear", (B.shape[-2], A.shape[-1]), {"A": A, "B": B / method.scale_at(path, A.shape[-2])})
        for path, (A, B) in layers.items()
    }
    return AdapterState(method, sites, **more)


def uneven() -> AdapterState:
    """Return an adapter whose layers need very different ranks; alpha is not the rank."""
    layers = {
        "blocks.0.up": pair(48, 16, [9.0, 8.0, 7.0, 6.0]),
        "blocks.0.down": pair(16, 48, [5.0, 0.1, 0.1, 0.05], seed=1),
        "blocks.1.up": pair(48, 16, [2.0, 1.5, 0.2, 0.1], seed=2),
        "blocks.1.down": pair(16, 48, [0.1, 0.05, 0.02, 0.01], seed=3),
    }
    return state_of(layers, lk.LoRA(rank=4, alpha=6.0), targets=("up", "down"))


def dense(state: AdapterState, path: str) -> Tensor:
    if path not in state.sites:
        return torch.zeros(())
    assert isinstance(state.method, lk.LoRA)
    tensors = state.sites[path].tensors
    scale = state.method.scale_at(path, tensors["A"].shape[-2])
    return scale * tensors["B"].double() @ tensors["A"].double()


def true_error(before: AdapterState, after: AdapterState) -> float:
    """Return the relative Frobenius error over all layers, from dense matrices."""
    lost = sum(float((dense(before, path) - dense(after, path)).square().sum()) for path in before.sites)
    return math.sqrt(lost / sum(float(dense(before, path).square().sum()) for path in before.sites))


def ranks(found: Compressed) -> dict[str, int]:
    return {cut.path: cut.rank_after for cut in found.layers}


SELECTIONS = [KeepEnergy(share=0.99), KeepEnergy(share=0.6), KeepNumbers(budget=400), KeepRank(rank=2)]
every_selection = pytest.mark.parametrize("selection", SELECTIONS, ids=repr)
METHODS = [
    lk.LoRA(rank=4, alpha=6.0),
    lk.LoRA(rank=4, alpha=6.0, scaling="rslora"),
    lk.LoRA(rank=9, alpha=6.0, rank_pattern={"up": 4, "down": 4}, alpha_pattern={"up": 3.0, "0.down": 11.0}),
]


# Figures --------------------------------------------------------------------------------------------


@every_selection
@pytest.mark.parametrize("method", METHODS, ids=["standard", "rslora", "patterns"])
def test_the_predicted_error_is_the_measured_one_and_that_of_the_dense_matrices(
    selection: Selection, method: lk.LoRA
) -> None:
    layers = {path: (site.tensors["A"], 1.5 * site.tensors["B"]) for path, site in uneven().sites.items()}
    before = state_of(layers, method)
    found = compress(before, selection)
    assert found.predicted_error > 0.001
    assert found.measured_error == pytest.approx(found.predicted_error, rel=ERROR)
    assert true_error(before, found.state) == pytest.approx(found.predicted_error, rel=ERROR)
    assert found.energy_kept == pytest.approx(1 - found.predicted_error**2)


@every_selection
def test_each_layers_figures_are_its_own(selection: Selection) -> None:
    before = uneven()
    found = compress(before, selection)
    for cut in found.layers:
        lost = (dense(before, cut.path) - dense(found.state, cut.path)).square().sum()
        assert cut.energy == pytest.approx(float(dense(before, cut.path).square().sum()), rel=ERROR)
        assert cut.predicted == pytest.approx(float(lost), rel=2 * ERROR, abs=ERROR * ERROR * cut.energy)
        kept = found.state.sites.get(cut.path)
        assert cut.numbers_after == (0 if kept is None else sum(t.numel() for t in kept.tensors.values()))


def test_an_adapter_in_bf16_keeps_its_dtype_and_the_measured_error_has_the_rounding() -> None:
    sites = {
        path: dataclasses.replace(site, tensors={name: t.bfloat16() for name, t in site.tensors.items()})
        for path, site in uneven().sites.items()
    }
    before = dataclasses.replace(uneven(), sites=sites)
    found = compress(before, KeepEnergy(share=0.999999))
    assert {t.dtype for site in found.state.sites.values() for t in site.tensors.values()} == {torch.bfloat16}
    assert found.measured_error > 2 * found.predicted_error
    assert found.measured_error == pytest.approx(true_error(before, found.state), rel=1e-3)


def test_without_a_tail_nothing_is_lost() -> None:
    A, B = pair(20, 30, [3.0, 2.0])
    padded = torch.cat([A, torch.randn(3, 30)]), torch.cat([B, torch.zeros(20, 3)], dim=1)
    found = compress(state_of({"layer": padded}), KeepEnergy(share=1.0))
    assert ranks(found) == {"layer": 2}
    assert found.measured_error < 1e-6  # fp32's rounding of the stored pair


# What is kept ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_the_share_is_reached_and_one_component_less_would_not_reach_it(share: float) -> None:
    found = compress(uneven(), KeepEnergy(share=share))
    assert found.energy_kept >= share
    last = min(
        (value**2 / (cut.numbers_after // cut.rank_after), value**2)
        for cut in found.layers
        if cut.rank_after
        for value in torch.linalg.svdvals(dense(uneven(), cut.path))[: cut.rank_after].tolist()
    )[1]
    assert found.energy_kept - last / sum(cut.energy for cut in found.layers) < share


def test_layers_are_weighed_against_each_other() -> None:
    found = compress(uneven(), KeepEnergy(share=0.98))
    assert ranks(found) == {"blocks.0.up": 4, "blocks.0.down": 1, "blocks.1.up": 1, "blocks.1.down": 0}


def test_a_component_of_a_large_layer_costs_more() -> None:
    layers = {"small": pair(8, 8, [1.0, 1.0]), "large": pair(400, 400, [1.1, 1.1])}
    assert ranks(compress(state_of(layers), KeepNumbers(budget=40))) == {"small": 2, "large": 0}
    assert ranks(compress(state_of(layers), KeepNumbers(budget=840))) == {"small": 2, "large": 1}


@pytest.mark.parametrize("budget", [64, 65, 200, 300, 511, 767])
def test_a_budget_is_kept_and_used_as_far_as_components_fit(budget: int) -> None:
    found = compress(uneven(), KeepNumbers(budget=budget))
    used = sum(cut.numbers_after for cut in found.layers)
    assert budget - 64 < used <= budget


def test_a_rank_is_that_of_every_layer_that_has_it() -> None:
    layers = {"deep": pair(9, 8, [3.0, 2.0, 1.0]), "flat": pair(9, 8, [3.0, 0.0, 0.0])}
    assert ranks(compress(state_of(layers), KeepRank(rank=2))) == {"deep": 2, "flat": 1}


def test_pooled_selection_beats_equal_ranks_at_equal_numbers() -> None:
    equal = compress(uneven(), KeepRank(rank=2))
    numbers = sum(cut.numbers_after for cut in equal.layers)
    assert compress(uneven(), KeepNumbers(budget=numbers)).predicted_error < 0.5 * equal.predicted_error


def test_a_stack_keeps_one_rank_for_all_its_matrices() -> None:
    first, second = pair(12, 10, [5.0, 4.0, 0.1]), pair(12, 10, [3.0, 0.1, 0.1], seed=1)
    stack = tuple(torch.stack(both) for both in zip(first, second, strict=True))
    before = state_of({"experts": (stack[0], stack[1])})
    found = compress(before, KeepEnergy(share=0.99))
    assert ranks(found) == {"experts": 2}
    assert found.state.sites["experts"].tensors["A"].shape == (2, 2, 10)
    assert true_error(before, found.state) == pytest.approx(found.predicted_error, rel=ERROR)


# The adapter ----------------------------------------------------------------------------------------


def test_layers_of_rank_0_are_gone_and_the_targets_mean_the_rest() -> None:
    found = compress(uneven(), KeepEnergy(share=0.98)).state
    assert set(found.sites) == {"blocks.0.up", "blocks.0.down", "blocks.1.up"}
    assert set(found.targets) == {"up", "blocks.0.down"}


def test_what_stands_beside_the_pairs_stays() -> None:
    rows = {"head[3:4]": SiteState("linear", (9, 8), {"rows": torch.randn(1, 8)}, runs=((3, 4),))}
    more = {"modules": {"norm": {"weight": torch.randn(8)}}, "rows": rows, "full_modules": ("norm",), "base_name": "b"}
    before = state_of({"layer": pair(9, 8, [2.0, 1.0])}, identity=None, **more)
    found = compress(before, KeepRank(rank=1)).state
    assert (found.modules, found.rows, found.full_modules, found.base_name) == (
        before.modules,
        before.rows,
        ("norm",),
        "b",
    )


def test_a_layer_with_a_trained_bias_keeps_a_pair() -> None:
    layers = {"first": pair(9, 8, [9.0, 8.0]), "second": pair(9, 8, [0.01, 0.001])}
    before = state_of(layers, lk.LoRA(rank=2, bias="lora_only"), biases={"second": torch.randn(9)})
    assert ranks(compress(before, KeepEnergy(share=0.9))) == {"first": 2, "second": 1}


@every_selection
def test_it_is_written_and_read_again_as_it_is(selection: Selection, tmp_path: Any) -> None:
    found = compress(uneven(), selection).state
    write_adapter(found, tmp_path)
    again = read_adapter(tmp_path)
    assert again.method == found.method
    for path, site in found.sites.items():
        assert all(torch.equal(again.sites[path].tensors[name], t) for name, t in site.tensors.items())


@pytest.mark.parametrize("method", [lk.LoRA(rank=4, alpha=6.0), lk.LoRA(rank=4, alpha=6.0, init="pissa")])
def test_a_trained_model_moves_by_what_was_left_out(method: lk.LoRA) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 10))
    x = torch.randn(6, 24)
    handle = lk.attach(model, method, ["0", "2"])
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before, deltas = handle.state(), {path: handle.delta(path) for path in ("0", "2")}
    found = compress(before, KeepEnergy(share=0.9))
    Handle(handle.detach()).add_state(found.state)
    now = lk.handle_of(model)
    assert now is not None
    left = {path: now.delta(path) if path in found.state.sites else 0.0 for path in deltas}
    lost = sum(float((deltas[path] - left[path]).square().sum()) for path in deltas)
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    assert math.sqrt(lost / whole) == pytest.approx(found.predicted_error, rel=DENSE)
    assert torch.isfinite(model(x)).all()


def test_the_parts_of_a_fused_projection_are_cut_apart_and_written(tmp_path: Any) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    model, x = Attention(), torch.randn(3, 16)
    handle = lk.attach(model, lk.LoRA(rank=4, alpha=6.0), "proj[0:8],proj[8:24]")
    with torch.no_grad():
        for number, parameter in enumerate(handle.parameters().values()):
            parameter.add_((1.0 + number) * torch.randn_like(parameter))
    found = compress(handle.state(), KeepEnergy(share=0.95)).state
    write_adapter(found, tmp_path)
    plain = handle.detach()
    Handle(plain).add_state(found)
    with torch.no_grad():
        expected = plain(x)
        own = lk.handle_of(plain)
        assert own is not None
        lk.load(own.detach(), tmp_path, check_base=False)
        torch.testing.assert_close(plain(x), expected)


def test_doras_magnitudes_stay_and_the_weights_error_is_near_the_pairs() -> None:
    model = nn.Sequential(nn.Linear(24, 32))
    handle = lk.attach(model, lk.DoRA(rank=4, alpha=6.0), ["0"])
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before, delta = handle.state(), handle.delta("0")
    found = compress(before, KeepRank(rank=2))
    assert torch.equal(found.state.sites["0"].tensors["magnitude"], before.sites["0"].tensors["magnitude"])
    assert any("magnitude" in note for note in found.notes)
    Handle(handle.detach()).add_state(found.state)
    now = lk.handle_of(model)
    assert now is not None
    lost, pairs_norm = (now.delta("0") - delta).norm(), math.sqrt(found.layers[0].energy)
    assert 0.5 < float(lost) / (found.predicted_error * pairs_norm) < 1.2


# Refusals -------------------------------------------------------------------------------------------


def test_a_method_without_pairs_is_refused_by_name() -> None:
    state = AdapterState(find_method("full"), {}, modules={"head": {"weight": torch.randn(3, 3)}})
    with pytest.raises(UnsupportedLayerError, match="no low-rank update"):
        compress(state, KeepRank(rank=1))


def test_vera_is_refused_by_name() -> None:
    sites = {"layer": SiteState("linear", (9, 8), {"b": torch.randn(9), "d": torch.randn(4)})}
    with pytest.raises(UnsupportedLayerError, match="method 'vera' keeps no pair"):
        compress(AdapterState(find_method("vera"), sites), KeepRank(rank=1))


def test_a_site_without_a_pair_is_refused_by_name() -> None:
    before = state_of({"layer": pair(9, 8, [2.0, 1.0])})
    site = dataclasses.replace(before.sites["layer"], tensors={"other": torch.randn(3)})
    with pytest.raises(UnsupportedLayerError, match=r"'odd' has 'other'"):
        compress(dataclasses.replace(before, sites={**before.sites, "odd": site}), KeepRank(rank=1))


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    A, B = pair(9, 8, [2.0, 1.0])
    with pytest.raises(UnsupportedLayerError, match="'layer' is not finite"):
        compress(state_of({"layer": (A / 0.0, B)}), KeepRank(rank=1))


def test_an_adapter_of_zeros_is_refused() -> None:
    with pytest.raises(InputError, match="every update of the adapter is zero"):
        compress(state_of({"layer": (torch.randn(2, 8), torch.zeros(9, 2))}), KeepRank(rank=1))


@pytest.mark.parametrize("selection", [KeepRank(rank=4), KeepEnergy(share=1.0), KeepNumbers(budget=10**6)], ids=repr)
def test_leaving_nothing_out_is_refused(selection: Selection) -> None:
    with pytest.raises(InputError, match="nothing would be cut"):
        compress(uneven(), selection)


def test_a_budget_below_one_component_is_refused_with_the_smallest() -> None:
    with pytest.raises(ConfigError, match="the smallest takes 64"):
        compress(uneven(), KeepNumbers(budget=63))


def test_a_budget_below_what_must_stay_is_refused() -> None:
    layers = {"first": pair(9, 8, [9.0, 8.0]), "second": pair(9, 8, [0.01, 0.001])}
    biases = {path: torch.randn(9) for path in layers}
    with pytest.raises(ConfigError, match="below the 34 that must stay"):
        compress(state_of(layers, lk.LoRA(rank=2, bias="lora_only"), biases=biases), KeepNumbers(budget=20))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(KeepEnergy, {"share": 0.0}), (KeepEnergy, {"share": 1.1}), (KeepNumbers, {"budget": 0}), (KeepRank, {"rank": 0})],
)
def test_a_selection_out_of_range_cannot_be_written_down(kind: type[Selection], fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(**fields)
