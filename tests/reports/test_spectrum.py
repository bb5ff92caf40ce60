from __future__ import annotations

import math

import pytest

from lorakit.errors import ShapeError
from lorakit.records import (
    AdapterSimilarity,
    AdapterSpectrum,
    BaseOverlap,
    LayerSimilarity,
    LayerSpectrum,
    SimilarityAt,
    from_json,
    to_json,
)
from lorakit.reports.spectrum import (
    as_json,
    by_kind,
    by_path,
    common_prefix,
    effective_rank,
    energy_kept,
    largest_first,
    learned_layers,
    lower_ranks,
    rank_for_energy,
    short_names,
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


def test_energy_kept_at_full_rank_is_all() -> None:
    assert energy_kept([3.0, 2.0, 0.1], 3) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("rank", "lower"), [(1, []), (2, [1]), (8, [1, 2, 4]), (12, [1, 2, 4, 8])])
def test_lower_ranks_are_the_powers_of_two_below(rank: int, lower: list[int]) -> None:
    assert lower_ranks(rank) == lower


def test_numbers_below_the_block_make_no_kinds_of_their_own() -> None:
    assert _paths("h.0.experts.0.up", "h.0.experts.1.up", "h.1.experts.0.up") == [
        ("experts.*.up", 0),
        ("experts.*.up", 0),
        ("experts.*.up", 1),
    ]


def test_a_part_of_a_projection_is_a_kind_of_its_own() -> None:
    assert _paths("h.0.attn.c_attn[q]", "h.0.attn.c_attn[v]") == [("attn.c_attn[q]", 0), ("attn.c_attn[v]", 0)]


def stack(num_experts: int = 3) -> list[LayerSpectrum]:
    return [LayerSpectrum("h.0.experts.up", (float(1 + i), 0.5), 10.0, expert=i) for i in range(num_experts)]


def test_the_matrices_of_a_stack_are_one_line_with_their_median() -> None:
    (line,) = by_path(learned_layers(stack()))
    assert line.name == "h.0.experts.up"
    assert line.median(lambda layer: layer.largest) == 2.0
    assert line.values(lambda layer: layer.largest) == [1.0, 2.0, 3.0]


def test_layers_of_a_kind_are_counted_once_each() -> None:
    layers = learned_layers([*stack(), LayerSpectrum("h.1.experts.up", (1.0,))])
    assert [(group.name, len(group.layers)) for group in by_kind(layers)] == [("experts.up", 4)]


def test_the_largest_update_is_the_one_largest_by_its_base_weight() -> None:
    layers = learned_layers([LayerSpectrum("a", (3.0,), 300.0), LayerSpectrum("b", (1.0,), 10.0)])
    assert [group.name for group in largest_first(by_path(layers))] == ["b", "a"]


def test_without_base_weights_the_largest_update_is_the_one_of_the_largest_norm() -> None:
    layers = learned_layers([LayerSpectrum("b", (1.0,)), LayerSpectrum("a", (3.0,))])
    assert [group.name for group in largest_first(by_path(layers))] == ["a", "b"]


@pytest.mark.parametrize(
    ("paths", "prefix"),
    [
        (["model.layers.0.up", "model.layers.1.up"], "model.layers"),
        (["model.layers.0.up", "lm_head"], ""),
        (["net.0", "net.2"], "net"),
        (["a.b"], "a"),
    ],
)
def test_the_common_prefix_is_the_modules_that_hold_all(paths: list[str], prefix: str) -> None:
    assert common_prefix(paths) == prefix


def test_a_short_name_keeps_its_first_and_last_parts() -> None:
    assert short_names(["attention.output.dense"], 20) == {"attention.output.dense": "attention….dense"}


def test_names_that_would_become_one_stay_long() -> None:
    names = ["attention.self.long.dense", "attention.output.long.dense"]
    assert list(short_names(names, 20).values()) == names


def test_json_has_every_matrix_of_a_stack() -> None:
    found = as_json(AdapterSpectrum("run", {"name": "lora"}, tuple(stack())))
    assert [layer["expert"] for layer in found["layers"]] == [0, 1, 2]
    assert found["layers"][0]["energy_kept"] == {"1": pytest.approx(0.8), "2": pytest.approx(1.0)}
    assert found["kinds"][0]["relative_norm"]["max"] == pytest.approx(math.hypot(3.0, 0.5) / 10.0)


def test_json_says_what_is_not_known() -> None:
    (layer,) = as_json(AdapterSpectrum("run", {"name": "lora"}, (LayerSpectrum("a", (0.0,)),)))["layers"]
    assert (layer["relative_norm"], layer["overlap"], layer["block"]) == (None, None, None)


def test_what_was_found_survives_json() -> None:
    overlap = BaseOverlap(1, 0.1, 0.2, 0.03, 0.01, 0.02, 0.001, 0.5, 0.4, 2.0, 3.0, None)
    alike = LayerSimilarity("a", (SimilarityAt(1, 1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),), expert=2)
    layers = (LayerSpectrum("a", (1.0,), 2.0, 2, 8, 4, overlap), LayerSpectrum("b", (0.5,)))
    similarity = AdapterSimilarity("other", {"name": "lora"}, (alike,), ("b",))
    found = AdapterSpectrum("run", {"name": "lora"}, layers, "base", None, similarity, ("a note",))
    assert from_json(AdapterSpectrum, to_json(found)) == found


def test_what_an_earlier_version_recorded_is_read() -> None:
    old = {"path": "a", "singular_values": [2.0, 1.0], "base_norm": 4.0}
    assert from_json(LayerSpectrum, old) == LayerSpectrum("a", (2.0, 1.0), 4.0)
