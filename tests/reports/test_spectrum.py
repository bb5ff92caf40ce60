from __future__ import annotations

import math

import pytest

from lorakit.errors import ShapeError
from lorakit.records import LayerSpectrum
from lorakit.reports.spectrum import (
    effective_rank,
    energy_kept,
    learned_layers,
    rank_for_energy,
    update_norm,
)


def test_effective_rank_of_equal_values_is_their_number() -> None:
    assert effective_rank([0.3] * 7) == pytest.approx(7.0, rel=1e-12)


def test_effective_rank_of_one_direction_is_one() -> None:
    assert effective_rank([5.0, 0.0, 0.0]) == pytest.approx(1.0, rel=1e-12)


def test_effective_rank_does_not_change_with_scale() -> None:
    values = [3.0, 1.0, 0.2]
    assert effective_rank([1e-6 * value for value in values]) == pytest.approx(effective_rank(values), rel=1e-9)


def test_effective_rank_equals_the_entropy_written_out() -> None:
    shares = (0.75, 0.25)
    entropy = -sum(share * math.log(share) for share in shares)
    assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(entropy), rel=1e-12)


@pytest.mark.parametrize("nothing", [[], [0.0, 0.0]])
def test_an_update_that_is_zero_uses_no_direction_and_loses_nothing(nothing: list[float]) -> None:
    assert effective_rank(nothing) == 0.0
    assert energy_kept(nothing, 1) == 1.0
    assert rank_for_energy(nothing, 0.9) == 0


def test_energy_kept_is_one_minus_the_relative_squared_error_of_the_cut() -> None:
    values = [4.0, 2.0, 1.0]
    error = update_norm(values[2:]) ** 2 / update_norm(values) ** 2
    assert energy_kept(values, 2) == pytest.approx(1.0 - error, rel=1e-12)


def test_energy_kept_takes_the_largest_values_whatever_their_order() -> None:
    assert energy_kept([1.0, 4.0, 2.0], 1) == energy_kept([4.0, 2.0, 1.0], 1)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ShapeError, match="rank -1"):
        energy_kept([1.0], -1)


def test_rank_for_energy_is_the_smallest_that_keeps_the_share() -> None:
    values = [3.0, 2.0, 1.0, 0.5]
    rank = rank_for_energy(values, 0.95)
    assert energy_kept(values, rank) >= 0.95 > energy_kept(values, rank - 1)


def _paths(*paths: str) -> list[tuple[str, int | None]]:
    layers = learned_layers([LayerSpectrum(path, (1.0,)) for path in paths])
    return [(layer.kind, layer.block) for layer in layers]


def test_layers_of_one_kind_stand_together_in_the_order_of_their_blocks() -> None:
    found = _paths("h.0.attn.q", "h.0.mlp.up", "h.1.attn.q", "h.1.mlp.up")
    assert found == [("attn.q", 0), ("attn.q", 1), ("mlp.up", 0), ("mlp.up", 1)]


def test_equal_places_of_encoder_and_decoder_stay_apart() -> None:
    found = _paths("encoder.block.0.q", "decoder.block.0.q")
    assert found == [("encoder.block.q", 0), ("decoder.block.q", 0)]


def test_numbered_modules_without_a_name_below_keep_the_name_above() -> None:
    assert _paths("net.0", "net.2", "head") == [("net", 0), ("net", 2), ("head", None)]


def test_the_relative_norm_is_unknown_without_a_base_norm() -> None:
    known, unknown = learned_layers([LayerSpectrum("a", (3.0, 4.0), 50.0), LayerSpectrum("b", (1.0,))])
    assert known.relative_norm == pytest.approx(0.1, rel=1e-12)
    assert unknown.relative_norm is None
