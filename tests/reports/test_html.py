from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RunFolderError
from lorakit.records import Choice, RunSummary, Sample
from lorakit.reports import comparison
from lorakit.reports.html import read_run, render_report, write_report

Run = tuple[RunSummary, list[dict[str, Any]]]
WriteRun = Callable[[RunSummary, list[dict[str, Any]]], Path]

_VOID = {"meta", "source", "img", "br"}


class Page(HTMLParser):
    """The text, the tags and the addresses of a page; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_holds_every_label_number_and_reason(classification_run: Run) -> None:
    summary, metrics = classification_run
    text = Page(render_report(summary, metrics, "runs/intents")).text
    expected = [comparison.headline(summary), *summary.labels, *summary.notes]
    expected += [words for row in comparison.measures(summary) for words in (row.name, *row.texts)]
    expected += [words for fact in comparison.facts(summary) for words in (fact.name, fact.value, fact.detail)]
    expected += [words for line in comparison.proof_lines(summary.proof) for words in (line.claim, line.detail)]
    expected += [words for choice in summary.choices for words in (choice.name, choice.value, choice.reason)]
    expected += [words for sample in summary.samples for words in (sample.input, sample.before, sample.after)]
    expected += [spectrum.path for spectrum in summary.spectra]
    expected += [summary.version, summary.identity, summary.model]
    missing = [words for words in expected if words not in text]
    assert missing == []


def test_the_page_needs_no_network_and_no_script(classification_run: Run) -> None:
    html = render_report(*classification_run, "run")
    page = Page(html)
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\(", html)


def test_texts_of_the_data_are_escaped_everywhere(classification_run: Run) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    summary = classification_run[0]
    after = replace(summary.after, classes=(replace(summary.after.classes[0], label=evil), *summary.after.classes[1:]))
    hostile = replace(
        summary,
        model=evil,
        revision=evil,
        labels=(evil, *summary.labels[1:]),
        after=after,
        method={"name": evil, "rank": evil},
        samples=(Sample(evil, evil, evil, evil),),
        choices=(Choice(evil, evil, evil),),
        notes=(evil,),
        spectra=(replace(summary.spectra[0], path=evil),),
        identity=evil,
        version=evil,
    )
    html = render_report(hostile, classification_run[1], evil)
    page = Page(html)
    assert "<script" not in html
    assert "onerror" not in {name for name in re.findall(r"<[a-z]+[^>]*?\s([a-z]+)=", html)}
    assert evil in "".join(page.words)
    assert "x" not in page.addresses


@pytest.mark.parametrize("task", ["generation", "language-modeling"])
def test_tasks_on_tokens_render_without_classes(generation_run: Run, task: str) -> None:
    page = Page(render_report(replace(generation_run[0], task=task), generation_run[1], "run"))
    assert "Perplexity on 20,145 held-out tokens fell from 34.2 to 3.67" in page.text
    assert "confusion" not in page.ids
    assert "lorakit generate run" in page.text


def test_a_run_with_nothing_optional_renders(classification_run: Run) -> None:
    summary = classification_run[0]
    bare = replace(
        summary,
        majority=None,
        probe=None,
        before=replace(summary.before, classes=(), confusion=(), macro_f1=None),
        after=replace(summary.after, classes=(), confusion=(), macro_f1=None),
        peak_memory_bytes=None,
        choices=(),
        samples=(),
        spectra=(),
        notes=(),
        proof=None,
        version="",
        method={},
    )
    page = Page(render_report(bare, [], "run"))
    assert "linear probe" not in page.text
    assert not {"confusion", "layers", "samples", "choices", "notes"} & set(page.ids)
    assert "not checked" in page.text


def test_an_interrupted_run_has_a_banner(classification_run: Run) -> None:
    assert "Interrupted" not in render_report(*classification_run, "run")
    assert "Interrupted" in render_report(replace(classification_run[0], finished=False), [], "run")


def test_a_loss_that_rose_is_called_so(generation_run: Run) -> None:
    summary = replace(generation_run[0], before=generation_run[0].after, after=generation_run[0].before)
    text = Page(render_report(summary, [], "run")).text
    assert "rose from 3.67 to 34.2" in text
    assert "does not help" in text


def test_commands_quote_a_folder_with_blanks(classification_run: Run) -> None:
    text = Page(render_report(*classification_run, "my runs/one")).text
    assert "lorakit predict 'my runs/one' rows.jsonl" in text


def test_light_and_dark_have_pictures_of_their_own(classification_run: Run) -> None:
    html = render_report(*classification_run, "run")
    assert html.count("prefers-color-scheme: dark") == 1 + html.count("<picture>")
    addresses = Page(html).addresses
    assert len(set(addresses)) == len(addresses)


def test_the_same_run_gives_the_same_page(classification_run: Run) -> None:
    assert render_report(*classification_run, "run") == render_report(*classification_run, "run")


def test_write_report_writes_one_file_and_returns_its_path(classification_run: Run, write_run: WriteRun) -> None:
    folder = write_run(*classification_run)
    path = write_report(folder)
    assert path == folder / "report.html"
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.jsonl", "report.html", "run.json"]
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_read_run_gives_back_what_was_written(classification_run: Run, write_run: WriteRun) -> None:
    summary, metrics = read_run(write_run(*classification_run))
    assert summary == classification_run[0]
    assert metrics == classification_run[1]


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        read_run(tmp_path / "nothing")


def test_a_file_is_not_a_run_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunFolderError, match="it is a file"):
        read_run(file)


def test_every_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"(?s)'run\.json' is missing.*'metrics\.jsonl' is missing"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task": "classif', "is not JSON"),
        ('{"task": "classification"}', "lacks the field 'model'"),
        ("null", "not a run's summary"),
        ("[]", "lacks the field 'task'"),
    ],
)
def test_a_broken_summary_says_what_is_wrong(
    classification_run: Run, write_run: WriteRun, content: str, message: str
) -> None:
    folder = write_run(*classification_run)
    (folder / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=message):
        read_run(folder)


def test_every_broken_line_of_the_metrics_is_named(classification_run: Run, write_run: WriteRun) -> None:
    folder = write_run(*classification_run)
    good = json.dumps(classification_run[1][0])
    (folder / "metrics.jsonl").write_text(f'{good}\n{{"kind": "tr\n{good}\n[1]\n{{"kind": "eval", "step": 2}}\n')
    with pytest.raises(RunFolderError, match=r"(?s)line 2 is not JSON.*line 4 lacks.*line 5 lacks loss"):
        read_run(folder)


def test_a_broken_run_keeps_its_old_report(classification_run: Run, write_run: WriteRun) -> None:
    folder = write_run(*classification_run)
    report = write_report(folder)
    before = report.read_bytes()
    (folder / "run.json").unlink()
    with pytest.raises(RunFolderError):
        write_report(folder)
    assert report.read_bytes() == before
