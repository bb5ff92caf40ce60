"""The digits demo -> ``report.html``: one page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.reports import digits_figures, digits_words, page
from lorakit.reports.digits_figures import Pixels
from lorakit.reports.digits_record import ChangedDigit, DigitsSummary, Measured
from lorakit.reports.page import Picture

SHOWN_AT_MOST = 24


@dataclass(frozen=True)
class Gallery:
    """Images that changed sides: some of them as (address, digit), and how many there are."""

    title: str
    good: bool
    images: tuple[tuple[str, ChangedDigit], ...]
    num_images: int


def render_page(summary: DigitsSummary, pixels: Pixels, folder: str) -> str:
    """Return the page; the same results give the same text.

    Args:
        summary: what was found.
        pixels: the test images.
        folder: where the run lies, as the reader would type it.
    """
    pictures = {
        "errors": page.picture(
            lambda theme: digits_figures.errors_per_digit(summary, "svg", theme),
            "Bar chart of the errors on each digit; the same numbers are in the table.",
        ),
        "sizes": page.picture(
            lambda theme: digits_figures.update_sizes(summary, "svg", theme),
            "Bar chart of the singular values and norms of each layer's update; the same numbers are in the table.",
        ),
    }
    return page.render(
        "digits.html.j2",
        summary=summary,
        headline=digits_words.headline(summary),
        setting=digits_words.setting(summary),
        outcomes=digits_words.outcomes(summary),
        added=digits_words.added(summary),
        columns=[
            ("before", summary.before),
            *((adapter.name, adapter.after) for adapter in summary.adapters),
            ("disabled", summary.disabled),
        ],
        pictures=pictures,
        matrices=[_matrix(title, measured) for title, measured in digits_figures.named_results(summary)],
        galleries=[
            (adapter.name, [_gallery(*group, pixels) for group in _groups(adapter.repaired, adapter.broken)])
            for adapter in summary.adapters
        ],
        layers=list(zip(*(adapter.layers for adapter in summary.adapters), strict=True)),
        commands=digits_words.commands(folder, summary),
        snippet=digits_words.snippet(folder, summary),
    )


def _matrix(title: str, measured: Measured) -> Picture:
    remark = digits_figures.result_remark(measured)
    return page.picture(
        lambda theme: digits_figures.confusion(measured, title, remark, "svg", theme),
        f"Confusion matrix, rows truth and columns what was read. {title}: {remark}.",
    )


def _groups(
    repaired: Sequence[ChangedDigit], broken: Sequence[ChangedDigit]
) -> list[tuple[str, bool, Sequence[ChangedDigit]]]:
    return [
        ("Repaired: wrong before, right now", True, repaired),
        ("Broken: right before, wrong now", False, broken),
    ]


def _gallery(title: str, good: bool, items: Sequence[ChangedDigit], pixels: Pixels) -> Gallery:
    shown = digits_figures.spread(items, SHOWN_AT_MOST)
    images = tuple((page.address(digits_figures.digit_png(pixels[item.index]), "png"), item) for item in shown)
    return Gallery(title, good, images, len(items))
