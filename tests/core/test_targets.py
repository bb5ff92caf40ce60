"""Which layers an entry names, and what is refused, always by name."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lorakit as lk
from lorakit.adapters.coverage import coverage
from lorakit.adapters.targets import find_sites, shortest_names
from lorakit.errors import InputError, TargetError, UnsupportedLayerError

from .models import OneLayer, Tower

Build = Callable[..., nn.Module]


def paths(model: nn.Module, targets: object, **more: object) -> list[str]:
    return [site.path for site in find_sites(model, targets, **more)]


# Entries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("blocks.0.up", ["blocks.0.up"]),  # an exact path
        ("up", ["blocks.0.up", "blocks.1.up"]),  # a suffix
        ("1.up", ["blocks.1.up"]),  # a suffix of two components
        ("blocks.*.down", ["blocks.0.down", "blocks.1.down"]),  # globs
        ("*.1.*", ["blocks.1.up", "blocks.1.down"]),
        ("blocks.[0].u?", ["blocks.0.up"]),
        (r"re:blocks\.\d\.(up|down)", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        (r"re:.*\.1\.up", ["blocks.1.up"]),
        ("up,head", ["blocks.0.up", "blocks.1.up", "head"]),  # several
        (["head", "embed"], ["embed", "head"]),  # in the model's order
        (("up", "blocks.0.up"), ["blocks.0.up", "blocks.1.up"]),  # named twice, taken once
    ],
)
def test_an_entry_names_these_layers(entry: object, expected: list[str]) -> None:
    assert paths(Tower(), entry) == expected


def test_a_suffix_starts_at_a_dot() -> None:
    with pytest.raises(TargetError, match="no layer matches target 'own'"):
        paths(Tower(), "own")


def test_a_regular_expression_matches_the_whole_path() -> None:
    with pytest.raises(TargetError, match="no layer matches target 're:up'"):
        paths(Tower(), "re:up")


def test_a_broken_regular_expression_is_a_target_error() -> None:
    with pytest.raises(TargetError, match=r"'re:\(up' is not a regular expression"):
        paths(Tower(), "re:(up")


def test_an_unmatched_entry_is_named_with_the_closest_also_when_others_match() -> None:
    with pytest.raises(TargetError, match=r"no layer matches target 'donw'\. Closest: 'down'"):
        paths(Tower(), ["up", "donw"])


def test_every_unmatched_entry_is_named() -> None:
    with pytest.raises(TargetError) as caught:
        paths(Tower(), ["upp", "head", "q_proj", "re:x.*"], exclude="dwn")
    message = str(caught.value)
    assert message.startswith("4 problems:")
    assert all(f"'{entry}'" in message for entry in ("upp", "q_proj", "re:x.*", "dwn"))


def test_a_container_lists_its_layers() -> None:
    with pytest.raises(TargetError, match=r"'blocks' is a ModuleList .*holds other layers: '0\.down', '0\.up'"):
        paths(Tower(), "blocks")


def test_entries_for_nothing_at_all_are_refused() -> None:
    with pytest.raises(TargetError, match="no target"):
        paths(Tower(), [])


# Excludes and layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("head", ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        ("blocks.1.*,head", ["blocks.0.up", "blocks.0.down"]),
        (r"re:blocks\..*", ["head"]),
        ("blocks", ["head"]),  # a container stands for what it holds
        (["blocks.0", "up"], ["blocks.1.down", "head"]),
    ],
)
def test_excludes_leave_out(exclude: object, expected: list[str]) -> None:
    assert paths(Tower(), "all-linear", exclude=exclude) == expected


def test_an_exclude_that_matches_nothing_is_named() -> None:
    with pytest.raises(TargetError, match=r"exclude: no layer matches target 'haed'.*'head'"):
        paths(Tower(), "all-linear", exclude="haed")


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(TargetError, match="no target is left"):
        paths(Tower(), "up", exclude="up")


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        (0, {0}),
        (-1, {2}),
        ("1", {1}),
        ("0-1", {0, 1}),
        ("0,2", {0, 2}),
        ("0, 1-2", {0, 1, 2}),
        ("last:1", {2}),
        ("last:2", {1, 2}),
        ("0,last:1", {0, 2}),
        ([0, 2], {0, 2}),
        ((-1, -2), {1, 2}),
        (range(1, 3), {1, 2}),
    ],
)
def test_a_range_of_layers_in_every_spelling(build: Build, layers: object, blocks: set[int]) -> None:
    found = paths(build("llama"), "q_proj", layers=layers)
    assert found == [f"model.layers.{block}.self_attn.q_proj" for block in sorted(blocks)]


def test_a_range_of_layers_leaves_out_what_is_in_no_block() -> None:
    assert paths(Tower(), "all-linear", layers="0-1") == [
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    ]


@pytest.mark.parametrize("layers", ["7", "0-3", [5], -4, "last:0", "last:4", "2-1", "0,2-1", []])
def test_blocks_that_are_not_there_are_refused_with_those_that_are(build: Build, layers: object) -> None:
    with pytest.raises(TargetError, match="this model has 0 to 2"):
        paths(build("llama"), "q_proj", layers=layers)


@pytest.mark.parametrize("layers", ["first", "0..2", "last:", "1-", ""])
def test_a_range_that_is_not_understood_says_how_to_write_one(build: Build, layers: str) -> None:
    with pytest.raises(TargetError, match="is not understood"):
        paths(build("llama"), "q_proj", layers=layers)


def test_layers_of_a_model_without_blocks_are_refused() -> None:
    with pytest.raises(TargetError, match="no block numbers"):
        paths(OneLayer(nn.Linear(2, 3)), "layer", layers="0")


# Refused by name ------------------------------------------------------------------------------------


class OwnForward(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class Inherits(nn.Linear):
    """A subclass that runs nn.Linear's very forward."""


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (OwnLinear(4, 6), "a OwnLinear, a Linear with a forward of its own"),
        (OwnForward(9, 4), "a OwnForward, a Embedding with a forward of its own"),
        (OwnAttention(8, 2), "a OwnAttention, a MultiheadAttention with a forward of its own"),
        (nn.Embedding(9, 4, max_norm=1.0), "max_norm rewrites the base weight"),
        (nn.LayerNorm(4), "'layer' is a LayerNorm"),
        (nn.BatchNorm1d(4), "'layer' is a BatchNorm1d"),
        (nn.EmbeddingBag(9, 4), r"'layer' is a EmbeddingBag.*Or name its own weights: 'layer\.weight'"),
        (nn.LayerNorm((4, 3)), r"'layer' is a LayerNorm.*Or name its own weights: 'layer\.weight', 'layer\.bias'"),
        (parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0"), "it computes 'weight_hh_l0'"),
        (parametrizations.weight_norm(nn.GRUCell(4, 6), "weight_ih"), "it computes 'weight_ih'"),
        (parametrizations.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight"), "it computes 'in_proj_weight'"),
        (parametrizations.weight_norm(nn.Bilinear(3, 4, 5)), "it computes 'weight'"),
    ],
)
def test_a_layer_without_ops_is_refused_by_name(layer: nn.Module, why: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=why) as caught:
        lk.attach(OneLayer(layer), lk.LoRA(rank=2), "layer")
    assert "layer 'layer'" in str(caught.value)


def test_a_subclass_that_inherits_the_forward_is_covered() -> None:
    assert paths(OneLayer(Inherits(4, 6)), "layer") == ["layer"]


@pytest.mark.parametrize("name", ["out_proj", "part.out_proj", "*out_proj"])
def test_the_projection_that_an_attention_reads_itself_is_a_weight_of_the_attention(name: str) -> None:
    model = nn.ModuleDict({"part": nn.MultiheadAttention(8, 2)})
    (site,) = find_sites(model, name)
    assert (site.path, site.host, site.ops.parameter) == ("part.out_proj", "part", "out_proj.weight")


@pytest.mark.parametrize("name", ["self_attn.out_proj", "out_proj"])
def test_training_in_full_a_part_of_an_attention_is_refused(name: str) -> None:
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16), "head": nn.Linear(8, 3)})
    with pytest.raises(UnsupportedLayerError, match=r"reads its weights itself.*Train 'encoder\.self_attn' in full"):
        lk.attach(model, lk.LoRA(rank=2), "head", train_modules=name)


def test_rows_of_a_convolution_are_refused_by_name() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "fc": nn.Linear(4, 6)})
    with pytest.raises(UnsupportedLayerError, match=r"'conv\[0:4\]': rows of a convolution.*Name 'conv' whole"):
        paths(model, "conv[0:4]")
    assert paths(model, "fc[0:4]") == ["fc[0:4]"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("lstm.weight_hh_l1", "no layer matches target 'lstm.weight_hh_l1'. Closest: 'lstm.weight_hh_l0'"),
        ("lstm.bias_ih_l0", "no layer matches target 'lstm.bias_ih_l0'. Closest: 'lstm.weight_ih_l0'"),
        ("attn.q_proj_weight", "no layer matches target 'attn.q_proj_weight'"),
        ("attn.bias_k", "no layer matches target 'attn.bias_k'"),
        ("attn.in_proj_weight[gate]", "'attn.in_proj_weight' has no part 'gate'. It has 'q', 'k', 'v'"),
        ("attn.in_proj_weight[20:25]", "'attn.in_proj_weight[20:25]': there are rows 0 to 24"),
        ("fc.extra", "no layer matches target 'fc.extra'"),
    ],
)
def test_a_weight_or_part_that_is_not_there_is_refused_by_name(target: str, why: str) -> None:
    fc = Inherits(8, 4)
    fc.extra = nn.Parameter(torch.zeros(3, 3))  # a layer with ops has no other weights than theirs
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 6), "attn": attention, "fc": fc})
    with pytest.raises(InputError, match=re.escape(why)):
        paths(model, target)


def test_a_model_without_any_layer_says_so() -> None:
    with pytest.raises(TargetError, match="this model has no layer that can be adapted by name"):
        paths(OneLayer(nn.LayerNorm(4)), "fc")


def test_unsupported_and_unmatched_entries_are_named_together() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 6)})
    with pytest.raises(TargetError) as caught:
        paths(model, ["fcc", "norm"])
    assert "'fcc'" in str(caught.value)
    assert "LayerNorm" in str(caught.value)


# Coverage and names ---------------------------------------------------------------------------------


def test_coverage_counts_matrix_parameters_only() -> None:
    model = Tower()
    found = coverage(model, find_sites(model, "all-linear"))
    # embed 13*8; blocks 2 * (8*16 + 16*8); head 8*13
    assert (found.reached, found.total) == (512 + 104, 104 + 512 + 104)
    assert found.unreached == (("embed", 104),)
    assert str(found) == "85.6 % of 720 matrix parameters; not: embed (104)"


def test_coverage_counts_modules_trained_in_full() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=2), "up", train_modules="head")
    assert handle.coverage().reached == 2 * 128 + 104


@pytest.mark.parametrize("name", ["head", "embed"])
def test_coverage_counts_a_tied_weight_under_either_of_its_names(name: str) -> None:
    model = Tower(tied=True)
    found = coverage(model, find_sites(model, name))
    assert (found.reached, found.total) == (104, 104 + 512)
    assert [path for path, _ in found.unreached] == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("down", "up")]


def test_coverage_says_the_same_while_attached() -> None:
    model = Tower()
    before = coverage(model, find_sites(model, "up"))
    assert lk.attach(model, lk.LoRA(rank=2), "up").coverage() == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "distilbert"])
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", "re:.*[02].*", "*1*"])
def test_the_shortest_names_mean_exactly_the_same_layers(build: Build, name: str, targets: str) -> None:
    model = build(name)
    chosen = [p for p in paths(model, targets)]
    names = shortest_names(model, chosen)
    assert paths(model, names) == chosen
    assert len(names) <= len(chosen)


def test_shortest_names_are_last_components_where_those_are_exact() -> None:
    assert shortest_names(Tower(), ["blocks.0.up", "blocks.1.up", "blocks.1.down"]) == ["blocks.1.down", "up"]


def test_the_targets_of_a_saved_adapter_are_the_shortest_names(build: Build) -> None:
    handle = lk.attach(build("llama"), lk.LoRA(rank=2), "attention", layers="last:2")
    model = build("llama")
    assert paths(model, handle.state().targets) == list(handle.state().sites)


def test_a_layer_named_under_two_paths_is_one_target() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    handle = lk.attach(model, lk.LoRA(rank=2))
    assert list(handle.updates()) == ["0"]
    assert handle.counts().trained == 16
    x = torch.randn(3, 4)
    before = model(x)
    with torch.no_grad():
        handle.parameters()["0.B"].fill_(0.3)
    unmerged = model(x)
    handle.merge()
    assert not torch.allclose(before, unmerged)
    torch.testing.assert_close(model(x), unmerged)


def test_a_name_that_resembles_nothing_is_answered_with_the_names_there_are(build: Build) -> None:
    with pytest.raises(TargetError, match=r"no layer matches target 'zzz'\. Layers here: .*'query'"):
        find_sites(build("bert"), "zzz")
