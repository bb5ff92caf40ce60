"""``docs/models.md`` says what the models are."""

from __future__ import annotations

from .page import PAGE, RENEW, renewed


def test_the_page_of_models_is_true() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, f"{PAGE.name} says other names than the models have: `{RENEW}` writes them"
