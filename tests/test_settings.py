"""Strict frozen values and the messages of those that cannot be."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field, field_validator

from lorakit.errors import ConfigError
from lorakit.settings import Settings


class Oven(Settings):
    """Settings of every kind that methods and configs have."""

    heat: Annotated[int, Field(ge=1)]
    mode: Literal["top", "bottom"] = "top"
    trays: dict[str, int] = Field(default_factory=dict)
    times: list[float] = Field(default_factory=list)

    @field_validator("heat")
    @classmethod
    def _not_too_hot(cls, value: int) -> int:
        if value > 300:
            raise ValueError(f"{value} degrees would burn the house down")
        return value


def test_an_unknown_field_names_the_closest_and_all_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Oven: unknown field 'heet'\. Closest: 'heat'\. Known: heat, mode"):
        Oven(heat=5, heet=7)  # type: ignore[call-arg]


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="field 'heat' is missing"):
        Oven()  # type: ignore[call-arg]


def test_a_wrong_value_is_shown_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"mode: Input should be 'top' or 'bottom' \(found 'side'\)"):
        Oven(heat=5, mode="side")  # type: ignore[arg-type]


def test_a_value_inside_a_field_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"trays\.a: .*\(found 'x'\)"):
        Oven(heat=5, trays={"a": "x"})  # type: ignore[dict-item]


def test_the_words_of_our_own_checks_stand_alone() -> None:
    with pytest.raises(ConfigError, match=r"^Oven: heat: 999 degrees would burn the house down \(found 999\)$"):
        Oven(heat=999)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="3 problems") as caught:
        Oven(heat=0, mode="side", moed="top")  # type: ignore[arg-type, call-arg]
    assert all(word in str(caught.value) for word in ("heat", "mode", "moed"))


def test_settings_cannot_be_changed_in_place() -> None:
    oven = Oven(heat=5)
    with pytest.raises(pydantic.ValidationError):
        oven.heat = 6  # type: ignore[misc]


def test_a_changed_copy_is_checked_like_a_new_value() -> None:
    assert Oven(heat=5).replaced(heat=6) == Oven(heat=6)
    with pytest.raises(ConfigError, match="heat"):
        Oven(heat=5).replaced(heat=0)


def test_equal_contents_are_equal_and_hash_alike() -> None:
    one, other = (Oven(heat=5, trays=trays, times=[1, 2]) for trays in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert one == other
    assert len({one, other, Oven(heat=6)}) == 2


def test_settings_of_another_type_with_the_same_contents_are_different() -> None:
    class Stove(Oven):
        """Another appliance."""

    assert Stove(heat=5) != Oven(heat=5)
    assert len({Stove(heat=5), Oven(heat=5)}) == 2
