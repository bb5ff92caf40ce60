"""LoRA's fields: patterns per layer, values that cannot be written down, and what a value is."""

from __future__ import annotations

import math

import pydantic
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, ShapeError, TargetError
from lorakit.methods import find_method

from .models import METHODS, Tower, method_named

LORA_LIKE = [name for name in METHODS if isinstance(find_method(name), lk.LoRA)]

# Patterns -------------------------------------------------------------------------------------------


def ranks(model: nn.Module, **fields: object) -> dict[str, int]:
    handle = lk.attach(model, lk.LoRA(**fields))
    return {path: update.get_parameter("A").shape[0] for path, update in handle.updates().items()}


def test_a_rank_pattern_sets_the_rank_of_the_layers_that_end_so() -> None:
    assert ranks(Tower(), rank=2, rank_pattern={"up": 5, "blocks.1.down": 3, "head": 1}) == {
        "blocks.0.up": 5,
        "blocks.0.down": 2,
        "blocks.1.up": 5,
        "blocks.1.down": 3,
        "head": 1,
    }


def test_a_patterns_key_is_a_regular_expression_and_the_first_match_counts() -> None:
    found = ranks(Tower(), rank=2, rank_pattern={r"blocks\.1\.(up|down)": 4, r"up": 3})
    assert found["blocks.1.up"] == 4
    assert found["blocks.0.up"] == 3


def test_a_patterns_key_matches_whole_components_only() -> None:
    with pytest.raises(TargetError, match=r"pattern 'own' matches no target.*'down'"):
        ranks(Tower(), rank=2, rank_pattern={"own": 4})


def test_every_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(TargetError) as caught:
        ranks(Tower(), rank_pattern={"ups": 4, "down": 2}, alpha_pattern={"haed": 3.0})
    assert "'ups'" in str(caught.value)
    assert "'haed'" in str(caught.value)
    assert "pattern 'down'" not in str(caught.value)


def test_an_alpha_pattern_changes_the_scale_with_the_layers_own_rank() -> None:
    method = lk.LoRA(rank=4, alpha=8, rank_pattern={"up": 2}, alpha_pattern={"up": 5, "head": 1})
    assert method.scale_at("blocks.0.up") == 2.5
    assert method.scale_at("blocks.0.down") == 2.0
    assert method.scale_at("head") == 0.25


def test_a_pattern_acts_on_the_update() -> None:
    handle = lk.attach(Tower(), lk.LoRA(rank=4, alpha=4, alpha_pattern={"head": 12}), seed=0)
    with torch.no_grad():
        handle.parameters()["head.B"].fill_(1.0)
    expected = 3.0 * torch.ones(13, 4) @ handle.parameters()["head.A"]
    torch.testing.assert_close(handle.delta("head"), expected)


def test_a_rank_above_the_smaller_side_is_refused_naming_all_layers() -> None:
    with pytest.raises(ShapeError) as caught:
        ranks(Tower(), rank=9)
    message = str(caught.value)
    assert "rank 9 is above the smaller side of 'blocks.0.up' (16 x 8)" in message
    assert all(f"'{path}'" in message for path in ("blocks.1.down", "head"))
    assert "rank_pattern" in message


def test_a_rank_equal_to_the_smaller_side_is_allowed() -> None:
    assert set(ranks(Tower(), rank=8).values()) == {8}


# Values that cannot be written down -----------------------------------------------------------------


@pytest.mark.parametrize("method", LORA_LIKE)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -1),
        ("rank", 2.5),
        ("rank", 8.0),
        ("rank", "8"),
        ("rank", True),
        ("alpha", 0),
        ("alpha", -2.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("dropout", 1),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("scaling", "linear"),
        ("bias", "some"),
        ("init", "orthogonall"),
        ("rank_pattern", {"up": -1}),
        ("alpha_pattern", {"up": math.nan}),
    ],
)
def test_a_value_out_of_range_is_a_config_error_that_names_the_field(method: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        method_named(method, **{field: value})


def test_an_unknown_field_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'rnak'\. Closest: 'rank'"):
        lk.LoRA(rnak=4)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        lk.LoRA(rank=0, alpha=math.nan, dropout=1, init="gausian", droput=0.1)
    message = str(caught.value)
    assert message.startswith("LoRA: 5 problems:")
    assert all(word in message for word in ("rank:", "alpha:", "dropout:", "'gausian'", "'droput'"))


def test_an_unknown_method_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"no method 'lroa'.*'lora'"):
        lk.attach(Tower(), "lroa")


# What a value is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_frozen(method: str) -> None:
    value = method_named(method)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        value.rank = 4


@pytest.mark.parametrize("method", LORA_LIKE)
def test_equal_methods_are_equal_and_hash_alike(method: str) -> None:
    first = method_named(method, rank_pattern={"up": 2, "down": 3})
    second = method_named(method, rank_pattern={"down": 3, "up": 2})
    other = method_named(method, rank_pattern={"up": 2})
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second, other}) == 2


def test_methods_of_different_types_differ() -> None:
    assert lk.LoRA() != lk.DoRA()


@pytest.mark.parametrize("method", METHODS)
def test_a_summary_is_read_back_as_the_same_method(method: str) -> None:
    fields = {"init": "gaussian", "dropout": 0.1, "rank_pattern": {"up": 2}} if method in LORA_LIKE else {}
    value = method_named(method, **fields)
    assert find_method(value.summary()) == value


def test_replaced_checks_like_a_new_value() -> None:
    assert lk.LoRA(rank=4).replaced(alpha=3) == lk.LoRA(rank=4, alpha=3)
    with pytest.raises(ConfigError, match="rank"):
        lk.LoRA().replaced(rank=0)


def test_a_methods_name_is_found_in_any_case() -> None:
    assert find_method("LoRA", rank=2) == lk.LoRA(rank=2)
    assert find_method("dora") == lk.DoRA()
