"""What the HTML pages share: their templates, and pictures drawn once light and once dark as part of the page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.reports import wording
from lorakit.reports.theme import DARK, LIGHT, Theme


@dataclass(frozen=True)
class Picture:
    """One picture in its light and its dark colours, as data addresses, with its meaning in words."""

    light: str
    dark: str
    words: str


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; a text of the data is always escaped, a value that is missing an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorakit.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        decimal=wording.decimal, significant=wording.significant, percent=wording.percent, count=wording.count
    )
    environment.filters["shortened"] = wording.shortened
    return environment.get_template(template).render(values)


def picture(draw: Callable[[Theme], bytes], words: str) -> Picture:
    """Draw an SVG in both themes.

    Args:
        draw: returns the SVG for a theme.
        words: what it shows, for those who do not see it.
    """
    return Picture(address(draw(LIGHT), "svg+xml"), address(draw(DARK), "svg+xml"), words)


def address(image: bytes, kind: str) -> str:
    """Return an image as an address that holds the image itself; ``kind`` as in ``image/png``."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
