"""``lorakit preview``: what it prints, as JSON, as a page, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lorakit.cli import preview

from .conftest import Done, write_rows


def run(*arguments: object) -> Done:
    """Run the command alone."""
    app = typer.Typer()
    app.callback()(lambda: None)
    preview.register(app)
    result = CliRunner().invoke(app, ["preview", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def test_learned_tokens_stand_in_brackets(place: Path) -> None:
    done = run(place / "decoder", place / "answers.jsonl", "--rows", 1)

    assert done.code == 0, done.stderr
    assert "what·is" in done.stdout
    assert "«·my·good</s>»" in done.stdout
    for part in ("prompts with completions in 'prompt', 'completion', 22 rows", "Rows by their tokens", "learned", "█"):
        assert part in done.stdout


def test_a_classifiers_rows_are_shown_with_their_class(place: Path) -> None:
    done = run(place / "encoder", place / "opinions.jsonl", "--rows", 2)

    assert "class negative" in done.stdout
    assert "the class is learned" in done.stdout


def test_json_is_one_object_and_nothing_else(place: Path) -> None:
    done = run(place / "decoder", place / "answers.jsonl", "--json", "--rows", 2)

    assert done.json["task"] == "generation"
    assert len(done.json["rows"]) == 2
    assert {piece["kind"] for piece in done.json["rows"][0]["pieces"]} == {"masked", "supervised"}


def test_a_page_is_written_whole_and_shows_texts_as_texts(place: Path, tmp_path: Path) -> None:
    rows = [{"question": f"<b>{word}</b> & what", "answer": "my cat"} for word in ("is", "was", "a", "the", "it")]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    done = run(
        place / "decoder", file, "--columns", "prompt=question,completion=answer", "--html", tmp_path / "page.html"
    )

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Page  {tmp_path / 'page.html'}" in done.stdout
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>\n")
    assert "<b>is</b>" not in page
    assert 'class="supervised' in page


def test_texts_that_look_like_markup_are_printed_as_they_are(place: Path, tmp_path: Path) -> None:
    rows = [{"text": f"[bold]good {n}[/bold] [/]", "label": "ab"[n % 2]} for n in range(20)]
    done = run(place / "encoder", write_rows(tmp_path / "rows.jsonl", rows), "--rows", 1)

    assert done.code == 0
    assert "<unk>" in done.stdout


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(place: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run(place / "encoder", place / "opinions.jsonl")

    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "promt=a"], "no layout has the field 'promt'.*Closest: 'prompt'"),
        (["--max-length", "99"], "above the model's context of 32"),
        (["--task", "clasification"], "unknown task 'clasification'"),
    ],
)
def test_what_cannot_be_done_is_refused(place: Path, options: list[str], message: str) -> None:
    from lorakit.errors import InputError

    with pytest.raises(InputError, match=message):
        run(place / "decoder", place / "answers.jsonl", *options)
