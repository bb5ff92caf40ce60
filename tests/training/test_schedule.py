"""Each schedule against its formula."""

from __future__ import annotations

import itertools
import math

import pytest

from lorakit.training.schedule import SHAPES, Schedule


@pytest.mark.parametrize("num_steps", [1, 2, 10, 333])
@pytest.mark.parametrize("name", SHAPES)
def test_the_rate_warms_up_over_six_percent_in_equal_rises(name: str, num_steps: int) -> None:
    warmup = max(1, math.ceil(0.06 * num_steps))
    factors = [Schedule(name, num_steps)(step) for step in range(warmup)]
    rises = [b - a for a, b in itertools.pairwise(factors)]
    assert factors[0] == pytest.approx(1 / (warmup + 1))
    assert rises == pytest.approx([1 / (warmup + 1)] * len(rises))


@pytest.mark.parametrize("num_steps", [1, 2, 10, 333])
def test_linear_falls_in_equal_steps_to_zero(num_steps: int) -> None:
    schedule = Schedule("linear", num_steps)
    warmup = schedule.num_warmup
    factors = [schedule(step) for step in range(warmup, num_steps + 1)]
    falls = [b - a for a, b in itertools.pairwise(factors)]
    assert falls == pytest.approx([-1 / max(1, num_steps - warmup)] * len(falls))
    assert schedule(num_steps) == 0.0


@pytest.mark.parametrize("warmup", [0, 0.06, 5])
def test_cosine_is_half_a_cosine_after_the_warm_up(warmup: float) -> None:
    schedule = Schedule("cosine", 50, warmup)
    start = schedule.num_warmup
    for step in range(start, 51):
        share = (step - start) / (50 - start)
        assert schedule(step) == pytest.approx((1 + math.cos(math.pi * share)) / 2)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    schedule = Schedule("constant", 50, 4)
    assert {schedule(step) for step in range(4, 50)} == {1.0}


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.001, 1), (0.06, 6), (0.5, 50), (1, 1), (30, 30), (1000, 100)])
def test_a_warm_up_is_a_share_below_one_and_else_a_number_of_steps(warmup: float, steps: int) -> None:
    assert Schedule("linear", 100, warmup).num_warmup == steps


@pytest.mark.parametrize("name", SHAPES)
def test_no_step_before_the_last_has_a_rate_of_zero_or_above_the_peak(name: str) -> None:
    schedule = Schedule(name, 40)
    assert all(0.0 < schedule(step) <= 1.0 for step in range(40))
