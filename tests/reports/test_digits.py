"""The words, tables and pages of the digits demo, on made-up results of every kind."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lorakit.reports import digits_words
from lorakit.reports.digits import SHOWN_AT_MOST, render_page
from lorakit.reports.digits_figures import overview_picture, spread
from lorakit.reports.digits_record import (
    Adapted,
    ChangedDigit,
    Claim,
    DigitsSummary,
    LayerUpdate,
    Measured,
    Recipe,
)
from lorakit.reports.digits_tables import digits_tables

PIXELS = np.zeros((40, 28, 28), dtype=np.uint8)


def errors(*wrong: int) -> Measured:
    """Make a result with these errors on each digit, 30 images each; wrong ones are read as the next digit."""
    rows = [[0] * 10 for _ in range(10)]
    for digit in range(10):
        rows[digit][digit], rows[digit][(digit + 1) % 10] = 30 - wrong[digit], wrong[digit]
    return Measured.of(tuple(map(tuple, rows)))


BEFORE = errors(1, 2, 3, 10, 5, 0, 1, 2, 3, 4)
WORSE = errors(1, 9, 9, 0, 9, 9, 9, 9, 9, 9)
BETTER = errors(0, 1, 1, 2, 1, 0, 1, 0, 0, 1)


def summary(alone: Measured = WORSE, replay: Measured = BETTER, **changes: Any) -> DigitsSummary:
    item = ChangedDigit(index=0, truth=3, before=8, after=3)
    layers = (LayerUpdate("linear1", 784, 1000, 1784, (0.5,), 0.03),)
    made = DigitsSummary(
        source="Made up.", data=None, network=(784, 1000, 2000, 10), seed=0, num_fit=700, num_choice=200, num_test=300,
        digit=3, asked=False, choice_counts=(20,) * 10, choice_errors=(0, 1, 2, 8, 1, 0, 0, 0, 1, 2),
        recipe=Recipe(1e-3, 10, 1e-3, 100, 10, 10, 1, 2.0, 2.0), before=BEFORE, disabled=BEFORE,
        adapters=(
            Adapted("alone", alone, (item,) * 3, (item,) * (SHOWN_AT_MOST + 7), layers),
            Adapted("replay", replay, (item,), (), layers),
        ),
        num_added=6794, num_base=2807010, percent=0.24203690, digest="ab" * 32, seconds=1.0,
        claims=(Claim("it is so", True, "seen"),),
    )  # fmt: skip
    return replace(made, **changes)


def said(name: str, found: DigitsSummary) -> str:
    return dict(digits_words.outcomes(found))[name]


def printed(found: DigitsSummary, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(digits_tables(found))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_errors_are_what_is_off_the_diagonal() -> None:
    assert BEFORE.errors == (1, 2, 3, 10, 5, 0, 1, 2, 3, 4)
    assert (BEFORE.total, BEFORE.taken_for(4)) == (31, 10)
    assert BEFORE.accuracy == pytest.approx(1 - 31 / 300)


def test_forgetting_is_called_so_only_where_the_total_rises() -> None:
    assert "but errors on all digits rose from 31 to 73 (+135 %)" in said("alone", summary())
    assert "This is forgetting" in said("alone", summary())
    assert "forgetting" not in said("alone", summary(alone=BETTER))


def test_a_replay_that_does_not_help_is_not_praised() -> None:
    assert "Part of this gain is simply more training" in said("replay", summary())
    assert "Replay did not hold the other digits here." in said("replay", summary(replay=WORSE))


def test_disabled_that_differs_is_said_loudly() -> None:
    assert "every prediction is what it was" in said("disabled", summary())
    assert "NOT what they were" in said("disabled", summary(disabled=BETTER))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [(10, 3, "fell from 10 to 3 (-70 %)"), (2, 4, "rose from 2 to 4 (+100 %)"), (5, 5, "stayed at 5"),
     (0, 2, "rose from 0 to 2"), (0, 0, "stayed at 0")],
)  # fmt: skip
def test_a_change_is_written_with_its_share(before: int, after: int, words: str) -> None:
    assert digits_words.moved(before, after) == words


def test_how_the_digit_was_chosen_is_said() -> None:
    chosen = digits_words.choice(summary())
    assert "3 is the worst: 8 of 20 wrong among 200 images kept back" in chosen
    assert "turns out to be worse" not in chosen
    assert digits_words.choice(summary(asked=True)) == "3, as asked."


def test_a_digit_that_the_test_finds_worse_is_named() -> None:
    assert "(On them 3 turns out to be worse: 20 images" in digits_words.choice(summary(digit=4))


def test_what_fails_is_shown_as_such() -> None:
    failed = summary(claims=(Claim("it is so", False, "it is not"),))
    assert "NO" in printed(failed)
    assert "✗ no" in render_page(failed, PIXELS, "run")


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(width: int) -> None:
    large = summary(num_test=10_000, num_fit=48_000, source="word " * 60)
    assert max(map(len, printed(large, width).splitlines())) <= width


def test_at_most_so_many_images_are_shown_and_the_rest_is_counted() -> None:
    html = render_page(summary(), PIXELS, "run")
    assert html.count("<figure>") == 3 + SHOWN_AT_MOST + 1
    assert f"{SHOWN_AT_MOST} shown, evenly spread; 7 more." in html


def test_images_are_spread_over_all() -> None:
    items = [ChangedDigit(index, 0, 0, 0) for index in range(100)]
    assert [item.index for item in spread(items, 4)] == [0, 25, 50, 75]


def test_names_of_folders_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    html = render_page(summary(source=evil, data=evil), PIXELS, evil)
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_the_picture_is_1600_by_900() -> None:
    from io import BytesIO

    from matplotlib import image

    assert image.imread(BytesIO(overview_picture(summary(), PIXELS)), format="png").shape[:2] == (900, 1600)
