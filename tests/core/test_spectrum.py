"""Singular values and directions of updates against dense ones, without ever making a dense matrix."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import SiteState, attach
from lorakit.adapters.spectrum import (
    Directions,
    decompose,
    layer_spectra,
    low_rank_pair,
    low_rank_updates,
    num_directions,
    overlap_with_base,
    projected_norm,
    shares_inside,
    similarities,
    singular_values,
    spectra,
    subspace_similarity,
    top_directions,
)
from lorakit.errors import ShapeError
from lorakit.records import BaseOverlap
from lorakit.training.memory import peak_bytes

from .models import KINDS, OneLayer, SoftPrompt, fill_with_noise, method_named, one_layer

# fp32, relative to the largest singular value.
TOLERANCE = 1e-5
# Of the randomised method against the exact decomposition: shares of an update and relative singular values.
RANDOMISED = 1e-4


def dense_values(delta: Tensor, count: int) -> Tensor:
    values: Tensor = torch.linalg.svdvals(delta.double())
    return values[:count].float()


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 24, 5), (24, 40, 5), (6, 50, 6), (50, 6, 6), (8, 8, 1)])
def test_values_are_those_of_the_dense_product(d_out: int, d_in: int, rank: int) -> None:
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    expected = dense_values(B @ A, rank)
    torch.testing.assert_close(singular_values(A, B), expected, rtol=0, atol=TOLERANCE * float(expected[0]))


def test_there_are_no_more_values_than_the_smaller_side() -> None:
    A, B = torch.randn(7, 4), torch.randn(30, 7)
    expected = dense_values(B @ A, 4)
    torch.testing.assert_close(singular_values(A, B), expected, rtol=0, atol=TOLERANCE * float(expected[0]))


def test_an_update_that_is_zero_has_zero_values() -> None:
    assert singular_values(torch.randn(3, 10), torch.zeros(8, 3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_layers_values_are_those_of_its_update(kind: str) -> None:
    handle = attach(one_layer(kind), method_named("lora"), targets=[KINDS[kind].target])
    fill_with_noise(handle)
    problems = []
    for found in spectra(handle):
        delta = handle.delta(found.path) if found.expert is None else handle.delta(found.path)[found.expert]
        expected = dense_values(delta, len(found.singular_values))
        if not torch.allclose(torch.tensor(found.singular_values), expected, rtol=0, atol=1e-5 * float(expected[0])):
            problems.append((found.path, found.expert))
        assert (found.d_out, found.d_in) == tuple(delta.shape)
    assert problems == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_norms_are_those_of_the_weights(kind: str) -> None:
    handle = attach(one_layer(kind), method_named("lora"), targets=[KINDS[kind].target])
    weights = {path: site.matrix() for path, site, _ in low_rank_updates(handle)}
    expected = [float(W.norm()) for weight in weights.values() for W in (weight if weight.dim() == 3 else [weight])]
    assert [found.base_norm for found in spectra(handle)] == pytest.approx(expected, rel=1e-5)


def test_the_scale_is_in_the_values() -> None:
    def values(alpha: float) -> tuple[float, ...]:
        handle = attach(OneLayer(nn.Linear(6, 10)), method_named("lora", alpha=alpha), targets=["layer"], seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in handle.parameters().values():
                parameter.normal_(generator=generator)
        return spectra(handle)[0].singular_values

    assert values(6.0) == pytest.approx([2 * value for value in values(3.0)])


def test_no_dense_matrix_is_made() -> None:
    width, rank = 1024, 8
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    assert peak_bytes(lambda: singular_values(A, B), torch.device("cpu")) < 4 * width * width / 8


def test_the_spectra_of_a_model_make_no_dense_matrix() -> None:
    width = 512
    handle = attach(OneLayer(nn.Linear(width, width)), method_named("lora"), targets=["layer"])
    assert peak_bytes(lambda: spectra(handle), torch.device("cpu")) < 4 * width * width / 8


def test_all_layers_of_a_model_of_seven_billion_take_seconds() -> None:
    num_layers, width, rank = 224, 4096, 8
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    start = time.perf_counter()
    for _ in range(num_layers):
        singular_values(A, B)
    assert time.perf_counter() - start < 20.0


# Directions ------------------------------------------------------------------------------------------


def pair_of(d_out: int = 40, d_in: int = 24, rank: int = 5, stack: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    return torch.randn(*stack, rank, d_in), torch.randn(*stack, d_out, rank)


def falling_weight(d_out: int, d_in: int) -> Tensor:
    """Return a weight whose singular values fall like 1 / sqrt(i), as slowly as those of trained weights."""
    count = min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(side, count)).Q for side in (d_out, d_in))
    return (left * torch.arange(1, count + 1) ** -0.5) @ right.mT


def exact_directions(W: Tensor, count: int) -> Directions:
    left, values, right = torch.linalg.svd(W.double(), full_matrices=False)
    return Directions(left.float(), values.float(), right.mT.float()).first(count)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(40, 24, 5), (24, 40, 5), (6, 50, 8), (50, 6, 8)])
def test_directions_and_values_give_the_product_again(d_out: int, d_in: int, rank: int) -> None:
    A, B = pair_of(d_out, d_in, rank)
    found = decompose(A, B)
    torch.testing.assert_close((found.left * found.values) @ found.right.mT, B @ A, rtol=0, atol=1e-4)


def test_directions_are_orthonormal() -> None:
    found = decompose(*pair_of())
    for side in (found.left, found.right):
        torch.testing.assert_close(side.mT @ side, torch.eye(5), rtol=0, atol=TOLERANCE)


def test_a_stack_is_decomposed_matrix_by_matrix() -> None:
    A, B = pair_of(stack=(3,))
    whole, alone = decompose(A, B), decompose(A[1], B[1])
    torch.testing.assert_close(whole.values[1], alone.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(singular_values(A, B)[1], alone.values, rtol=1e-5, atol=0)


def test_a_change_of_basis_between_the_factors_changes_nothing() -> None:
    A, B = pair_of()
    mixed = torch.randn(5, 5, dtype=torch.float64) + 3.0 * torch.eye(5, dtype=torch.float64)
    other = (mixed @ A.double()).float(), (B.double() @ torch.linalg.inv(mixed)).float()
    W = torch.randn(40, 24)
    before, after = (overlap_with_base(decompose(*pair), W) for pair in ((A, B), other))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(singular_values(*other), singular_values(A, B), rtol=1e-4, atol=0)
    assert dataclasses.astuple(after) == pytest.approx(dataclasses.astuple(before), rel=1e-3)


@pytest.mark.parametrize(("rank", "used"), [(5, 5), (5, 2), (5, 0)])
def test_only_values_above_rounding_are_directions(rank: int, used: int) -> None:
    A, B = pair_of(rank=rank)
    B[:, used:] = 0.0
    assert num_directions(decompose(A, B).values) == used


# The base weight's first directions -------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize(("d_out", "d_in"), [(384, 256), (256, 384)])
def test_the_randomised_directions_span_those_of_the_exact_decomposition(d_out: int, d_in: int, count: int) -> None:
    W = falling_weight(d_out, d_in)
    found, exact = top_directions(W, count), exact_directions(W, count)
    assert float(subspace_similarity(found.left, exact.left)) == pytest.approx(1.0, abs=RANDOMISED)
    assert float(subspace_similarity(found.right, exact.right)) == pytest.approx(1.0, abs=RANDOMISED)
    torch.testing.assert_close(found.values, exact.values, rtol=RANDOMISED, atol=0)


def test_the_directions_of_a_trained_weight_are_those_of_the_exact_decomposition(shared: Any) -> None:
    from safetensors import safe_open

    with safe_open(shared / "models" / "tiny-llama-en" / "model.safetensors", framework="pt") as opened:
        W = opened.get_tensor("model.layers.3.mlp.down_proj.weight")
    found, exact = top_directions(W, 8), exact_directions(W, 8)
    assert float(subspace_similarity(found.right, exact.right)) == pytest.approx(1.0, abs=RANDOMISED)


def test_the_directions_of_a_small_weight_are_exact() -> None:
    W = torch.randn(30, 20)
    torch.testing.assert_close(top_directions(W, 20).values, exact_directions(W, 20).values, rtol=1e-5, atol=0)


def test_directions_repeat_and_leave_the_random_state_alone() -> None:
    W = falling_weight(384, 256)
    state = torch.random.get_rng_state()
    first, again = top_directions(W, 4), top_directions(W, 4)
    assert torch.equal(first.left, again.left)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_more_directions_are_given_than_there_are() -> None:
    assert top_directions(torch.randn(3, 9), 8).values.shape == (3,)


# The update against its base weight ------------------------------------------------------------------


def written_out(delta: Tensor, W: Tensor, count: int) -> dict[str, float]:
    """Return section 7.3's figures from dense matrices and exact decompositions."""
    base, own = exact_directions(W, count), exact_directions(delta, count)
    whole = float(delta.norm()) ** 2
    projected = float((own.left.mT @ W @ own.right).norm())
    return {
        "outputs": float((base.left.mT @ delta).norm()) ** 2 / whole,
        "inputs": float((delta @ base.right).norm()) ** 2 / whole,
        "both": float((base.left.mT @ delta @ base.right).norm()) ** 2 / whole,
        "projected": projected,
        "base_projected": float((base.left.mT @ W @ base.right).norm()),
        "amplification": float(delta.norm()) / projected,
    }


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 24), (384, 256)], ids=["exact", "randomised"])
def test_overlap_is_what_dense_matrices_say(d_out: int, d_in: int) -> None:
    A, B = pair_of(d_out, d_in)
    W = falling_weight(d_out, d_in)
    found = overlap_with_base(decompose(A, B), W)
    assert found is not None
    expected = written_out(B @ A, W, 5)
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-2, abs=RANDOMISED)


def test_an_update_along_the_base_weights_first_directions_is_all_inside_them() -> None:
    W = falling_weight(40, 24)
    first = exact_directions(W, 3)
    found = overlap_with_base(decompose(first.right.mT, 0.1 * first.left * first.values), W)
    assert found is not None
    assert (found.outputs, found.inputs, found.both) == pytest.approx((1.0, 1.0, 1.0), abs=TOLERANCE)
    assert found.projected == pytest.approx(found.base_projected, rel=1e-4)
    assert found.amplification == pytest.approx(0.1, rel=1e-4)


def test_all_directions_hold_all_of_any_update() -> None:
    W, update = torch.randn(24, 24), decompose(*pair_of(24, 24))
    shares = shares_inside(update, top_directions(W, 24))
    assert [float(share) for share in shares] == pytest.approx([1.0, 1.0, 1.0], abs=TOLERANCE)


def test_the_amplification_grows_with_the_update_and_the_shares_do_not() -> None:
    (A, B), W = pair_of(), torch.randn(40, 24)
    once, thrice = (overlap_with_base(decompose(A, factor * B), W) for factor in (1.0, 3.0))
    assert once is not None
    assert thrice is not None
    assert thrice.amplification == pytest.approx(3.0 * once.amplification, rel=1e-4)
    assert thrice.both == pytest.approx(once.both, rel=1e-3)


@pytest.fixture
def by_chance() -> list[BaseOverlap]:
    """Return the overlap of 1000 random updates, of which a mean is off by a few percent."""
    W = falling_weight(30, 20)
    found = [overlap_with_base(decompose(*pair_of(30, 20, 4)), W) for _ in range(1000)]
    return [overlap for overlap in found if overlap is not None]


@pytest.mark.parametrize("name", ["outputs", "inputs", "both"])
def test_random_updates_have_the_share_that_is_called_random(name: str, by_chance: list[BaseOverlap]) -> None:
    mean = sum(getattr(overlap, name) for overlap in by_chance) / len(by_chance)
    assert mean == pytest.approx(getattr(by_chance[0], f"{name}_random"), rel=0.1)


def test_random_updates_meet_the_part_of_the_base_weight_that_is_called_random(by_chance: list[BaseOverlap]) -> None:
    root_mean_square = math.sqrt(sum(overlap.projected**2 for overlap in by_chance) / len(by_chance))
    assert root_mean_square == pytest.approx(by_chance[0].projected_random, rel=0.1)


def test_an_update_that_is_zero_has_no_overlap() -> None:
    A, B = pair_of()
    assert overlap_with_base(decompose(A, torch.zeros_like(B)), torch.randn(40, 24)) is None


def test_a_base_weight_that_is_zero_is_amplified_by_no_finite_factor() -> None:
    found = overlap_with_base(decompose(*pair_of()), torch.zeros(40, 24))
    assert found is not None
    assert (found.amplification, found.amplification_random) == (None, None)


def test_a_weight_in_half_precision_is_taken_as_it_is() -> None:
    W, update = falling_weight(40, 24).bfloat16(), decompose(*pair_of())
    torch.testing.assert_close(projected_norm(W, update), projected_norm(W.float(), update), rtol=1e-6, atol=0)


def test_a_base_weight_costs_one_copy_in_fp32_and_no_dense_update() -> None:
    W, pair = falling_weight(1024, 1024).bfloat16(), pair_of(1024, 1024, 4)
    peak = peak_bytes(lambda: layer_spectra("layer", pair, W, overlap=True), torch.device("cpu"))
    # The copy, and the blocks of the iteration: 7 blocks of 4 + 8 columns, their basis and its products.
    assert peak < 4 * 1024 * 1024 + 6 * 4 * 1024 * 7 * 12


def test_a_base_weight_of_another_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="'layer' is 40 x 24 in the adapter, 24 x 40 in the base"):
        layer_spectra("layer", pair_of(), torch.randn(24, 40))


def test_every_matrix_of_a_stack_is_described_with_its_own_weight() -> None:
    A, B = pair_of(stack=(3,))
    W = torch.randn(3, 40, 24)
    found = layer_spectra("experts.up", (A, B), W, overlap=True)
    (alone,) = layer_spectra("experts.up", (A[2], B[2]), W[2], overlap=True)
    assert [spectrum.expert for spectrum in found] == [0, 1, 2]
    assert found[2].singular_values == pytest.approx(alone.singular_values, rel=1e-4)
    assert found[2].overlap is not None
    assert alone.overlap is not None
    assert dataclasses.astuple(found[2].overlap) == pytest.approx(dataclasses.astuple(alone.overlap), rel=1e-3)


# Two adapters ----------------------------------------------------------------------------------------


def test_a_subspace_is_like_itself_in_any_basis() -> None:
    basis = torch.linalg.qr(torch.randn(20, 4)).Q
    turned = basis @ torch.linalg.qr(torch.randn(4, 4)).Q
    assert float(subspace_similarity(basis, turned)) == pytest.approx(1.0, abs=TOLERANCE)


def test_orthogonal_subspaces_are_not_alike() -> None:
    basis = torch.linalg.qr(torch.randn(20, 8)).Q
    assert float(subspace_similarity(basis[:, :4], basis[:, 4:])) == pytest.approx(0.0, abs=TOLERANCE)


def test_a_subspace_is_like_one_that_contains_it() -> None:
    basis = torch.linalg.qr(torch.randn(20, 8)).Q
    assert float(subspace_similarity(basis[:, :3], basis)) == pytest.approx(1.0, abs=TOLERANCE)


def test_random_subspaces_are_as_alike_as_is_called_random() -> None:
    found = [similarities("layer", pair_of(30, 20, 4), pair_of(30, 20, 6))[0].at[-1] for _ in range(200)]
    assert (found[0].i, found[0].j) == (4, 6)
    assert sum(at.A for at in found) / 200 == pytest.approx(found[0].inputs_random, rel=0.1)
    assert sum(at.outputs for at in found) / 200 == pytest.approx(found[0].outputs_random, rel=0.1)


def test_an_adapter_is_like_itself_everywhere() -> None:
    pair = pair_of()
    (found,) = similarities("layer", pair, pair)
    assert [(at.i, at.j) for at in found.at] == [(1, 1), (2, 2), (4, 4), (5, 5)]
    assert [value for at in found.at for value in (at.A, at.B, at.inputs, at.outputs)] == pytest.approx(
        [1.0] * 16, abs=TOLERANCE
    )


def test_all_directions_of_a_factor_span_those_of_the_update() -> None:
    (found,) = similarities("layer", pair_of(), pair_of())
    last = found.at[-1]
    assert last.inputs == pytest.approx(last.A, rel=1e-3)
    assert last.outputs == pytest.approx(last.B, rel=1e-3)


def test_an_adapter_that_is_zero_is_like_nothing() -> None:
    A, B = pair_of()
    (found,) = similarities("layer", (A, torch.zeros_like(B)), (A, B))
    assert found.at == ()


def test_updates_of_other_sizes_are_not_compared() -> None:
    with pytest.raises(ShapeError, match="'layer' is 40 x 24 in one adapter and 24 x 40 in the other"):
        similarities("layer", pair_of(), pair_of(24, 40))


# Saved adapters --------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "rslora": {"scaling": "rslora"},
    "patterns": {"rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 7.0}},
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_factors_of_a_saved_adapter_are_the_live_ones(method: str, settings: dict[str, Any]) -> None:
    handle = attach(one_layer("linear"), method_named(method, **settings), targets=["layer"])
    fill_with_noise(handle)
    state = handle.state()
    saved = low_rank_pair(state.method, "layer", state.sites["layer"])
    ((path, _, live),) = low_rank_updates(handle)
    assert path == "layer"
    assert saved is not None
    assert [torch.equal(one, other) for one, other in zip(saved, live, strict=True)] == [True, True]


def test_a_method_whose_tensors_do_not_say_what_the_update_is_needs_its_model() -> None:
    A, B = pair_of()
    plain = SiteState("linear", (40, 24), {"A": A, "B": B})
    gained = SiteState("linear", (40, 24), {"A": A, "B": B, "gain": torch.ones(5)})
    assert low_rank_pair(SoftPrompt(), "layer", plain) is None
    assert low_rank_pair(method_named("lora"), "layer", gained) is None
