from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RunFolderError
from lorakit.methods import find_method
from lorakit.records import Choice, RunSummary, Sample
from lorakit.reports import comparison
from lorakit.reports.html import read_run, render_report, write_report
from lorakit.reports.reproduction import reproduction
from lorakit.training.config import SHORTHANDS, RunConfig, TrainConfig, write_config

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
        notes=(f"note {evil}",),
        spectra=(replace(summary.spectra[0], path=evil),),
        identity=evil,
        version=evil,
    )
    line = {"kind": "eval", "step": 1, "loss": 2.0, "samples": [vars(hostile.samples[0])]}
    warning = {"kind": "warning", "step": 1, "loss": 2.0, "name": "evil", "text": evil}
    settings = {"model": evil, "data": evil, "targets": evil}
    html = render_report(hostile, [*classification_run[1], line, warning], evil, settings)
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


def few_pictures(run: Run) -> Run:
    """Return a run of which only losses and scores are drawn."""
    summary, metrics = run
    return replace(summary, spectra=(), after=replace(summary.after, classes=(), confusion=())), metrics


def test_every_evaluation_is_in_the_table_and_one_is_the_best(classification_run: Run) -> None:
    summary, metrics = few_pictures(classification_run)
    text = Page(render_report(summary, metrics, "run")).text
    table = text.partition("The evaluations as a table")[2].partition("Best:")[0]
    assert [f"{line['loss']:.3f}" in table for line in metrics if line["kind"] == "eval"] == [True] * 10
    assert re.findall(r"(\d+) \(best\)", table) == ["150"]


@pytest.mark.parametrize(
    ("task", "accuracies", "losses", "best"),
    [
        ("classification", (0.5, 0.75, 0.75), (0.1, 0.3, 0.2), 3),
        ("classification", (0.5, 0.75, 0.75), (0.1, 0.2, 0.2), 2),
        ("generation", (0.5, 0.75, 0.75), (0.1, 0.3, 0.2), 1),
        ("generation", (0.1, 0.2, 0.3), (float("nan"), 0.3, 0.3), 2),
    ],
)
def test_the_best_evaluation_is_the_one_that_training_keeps(
    classification_run: Run, task: str, accuracies: tuple[float, ...], losses: tuple[float, ...], best: int
) -> None:
    metrics = [
        {"kind": "eval", "step": step, "loss": loss, "accuracy": accuracy}
        for step, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True), start=1)
    ]
    assert comparison.best_step(replace(classification_run[0], task=task), metrics) == best


def test_sample_answers_are_shown_step_by_step(generation_run: Run) -> None:
    lines = [
        {"kind": "eval", "step": step, "loss": 2.0, "samples": [
            {"input": "name[Aromi]", "expected": "Aromi is", "before": "Once upon", "after": f"answer {step}"}
        ]}
        for step in (8, 16)
    ]  # fmt: skip
    page = Page(render_report(few_pictures(generation_run)[0], lines, "run"))
    assert "before Once upon step 8 answer 8 step 16 answer 16" in page.text
    assert "details" in page.tags


def test_a_warning_has_its_step_and_is_no_note_as_well(classification_run: Run) -> None:
    summary, metrics = few_pictures(classification_run)
    warning = {"kind": "warning", "step": 22, "epoch": 0.4, "loss": 9.0, "name": "rate", "text": "The loss has risen."}
    warned = replace(summary, notes=(*summary.notes, "The loss has risen."))
    page = Page(render_report(warned, [*metrics, warning], "run"))
    assert "step 22 : The loss has risen." in page.text
    assert page.text.count("The loss has risen.") == 1
    assert summary.notes[0] in page.text


def test_a_run_without_warnings_has_no_card_for_them(classification_run: Run) -> None:
    assert "warnings" not in Page(render_report(*few_pictures(classification_run), "run")).ids


def test_the_time_per_step_is_the_median_of_the_measured_ones(classification_run: Run) -> None:
    metrics = [
        {"kind": "train", "step": step, "loss": 1.0, "seconds": seconds}
        for step, seconds in enumerate((0.5, 0.7, 1.0), start=1)
    ]
    text = Page(render_report(few_pictures(classification_run)[0], metrics, "run")).text
    assert "time per step 0.300 s median of 3 steps; the slowest took 0.500 s" in text


def test_only_an_unfinished_run_is_gone_on_with(classification_run: Run) -> None:
    summary, metrics = few_pictures(classification_run)
    assert "lorakit resume" not in render_report(summary, metrics, "run")
    assert "lorakit resume 'my run'" in Page(render_report(replace(summary, finished=False), metrics, "my run")).text


def settings_of(command: str) -> RunConfig:
    """Return what the command line makes of a command."""
    from typer.main import get_command

    from lorakit.cli.main import app
    from lorakit.cli.train import flags, read_settings

    program, name, *words = shlex.split(command)
    assert (program, name) == ("lorakit", "train")
    train = get_command(app).commands[name]  # type: ignore[attr-defined]
    given = train.make_context(name, words).params
    model, data, settings = read_settings(given["config"], flags(given))
    return RunConfig(**settings.model_dump(), model=model, data=data)


def compared(config: RunConfig) -> dict[str, Any]:
    """Return what must be the same, the method with its shorthands applied."""
    apart = {"method", *SHORTHANDS, "output", "force"}
    return config.model_dump(exclude=apart) | {"method": config.resolved_method().summary()}


CHANGES: dict[str, Any] = {
    "task": "classification",
    "method": find_method("dora").summary(),
    "targets": "re:.*(q|v)_proj$",
    "add_tokens": ["redboat", "skycar"],
    "train_vocabulary": "full",
    "exclude": "lm_head,it's",
    "layers": "last:4",
    "train_modules": ["score", "norm layer"],
    "columns": {"prompt": "my question", "completion": "a"},
    "epochs": 1.5,
    "max_steps": 24,
    "lr": 1e-05,
    "optimizer": "sgd",
    "schedule": "cosine",
    "warmup": 10.0,
    "batch_size": 4,
    "micro_batch": 2,
    "halve_micro_at": 3,
    "weight_decay": 0.01,
    "clip_norm": 0.3,
    "eval_every": 8,
    "save_every": 5,
    "keep": 2,
    "patience": 3,
    "grad_checkpointing": True,
    "compile": True,
    "packing": "off",
    "cache_prefix": True,
    "recompute": "off",
    "validation": "/data/held out.jsonl",
    "max_length": 64,
    "dtype": "bf16",
    "device": "cuda:1",
    "seed": 7,
    "log_to": "tensorboard,wandb",
    "revision": "-v1",
    "trust_remote_code": True,
}
OTHERS: list[tuple[str, Any]] = [
    ("method", find_method({"name": "lora", "rank": 4, "alpha": 2.5}).summary()),
    ("method", find_method({"name": "lora", "dropout": 0.1}).summary()),
    ("method", find_method({"name": "lora", "init": "pissa"}).summary()),
    ("method", find_method({"name": "lora", "init": {"name": "pissa", "steps": 4}}).summary()),
    ("method", find_method({"name": "lora", "rank": "auto", "budget": 9000}).summary()),
    ("targets", ["q_proj", "v_proj"]),
    ("train_modules", ["a,b"]),
    ("train_modules", "score"),
    ("columns", {"prompt": "a,b"}),
    ("columns", {"prompt": "a=b", "completion": ""}),
    ("columns", {"prompt": " a "}),
    ("columns", {}),
    ("validation", 0.25),
    ("log_to", ["tensorboard"]),
    ("layers", [0, 3]),
    ("model", "-odd model"),
    ("data", "it's; rm -rf $HOME.jsonl"),
]


@pytest.mark.parametrize(("name", "value"), [*CHANGES.items(), *OTHERS], ids=str)
def test_the_command_gives_back_each_setting(tmp_path: Path, name: str, value: Any) -> None:
    settings = {"model": "org/model", "data": "rows.jsonl", name: value}
    (tmp_path / "config.yaml").write_text(write_config(settings))
    command, _ = reproduction(settings, str(tmp_path))
    assert command is not None
    assert compared(settings_of(command)) == compared(RunConfig(**settings))


def test_the_command_gives_back_all_settings_at_once_by_flags() -> None:
    settings = {**CHANGES, "model": "org/model", "data": "rows.jsonl", "halve_micro_at": None}
    command, _ = reproduction(settings, "run")
    assert command is not None
    assert "--config" not in command
    assert compared(settings_of(command)) == compared(RunConfig(**settings))


def test_every_setting_is_tried_in_a_command() -> None:
    assert set(TrainConfig.model_fields) - set(CHANGES) == {*SHORTHANDS, "output", "force"}


def test_a_command_names_only_what_differs_from_the_defaults() -> None:
    settings = {"model": "m", "data": "d.jsonl", "method": find_method("lora").summary(), "lr": 0.001, "seed": 0}
    assert reproduction(settings, "run")[0] == "lorakit train m d.jsonl --lr 0.001"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "has no config.yaml"),
        ({"model": None, "data": "d.jsonl"}, "Python objects"),
        ({"model": "m", "data": "d.jsonl", "gone": 1}, "does not fit this version"),
    ],
)
def test_a_run_without_a_command_says_why(
    classification_run: Run, settings: dict[str, Any] | None, reason: str
) -> None:
    page = Page(render_report(*few_pictures(classification_run), "run", settings))
    assert reason in page.text
    assert "lorakit train" not in page.text


def test_the_page_of_a_run_folder_has_its_command(classification_run: Run, write_run: WriteRun) -> None:
    folder = write_run(*few_pictures(classification_run))
    (folder / "config.yaml").write_text("model: my model\ndata: rows.jsonl\nlr: 0.002\n")
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "lorakit train 'my model' rows.jsonl --lr 0.002" in text


def test_the_page_says_what_was_trained_on_what(classification_run: Run) -> None:
    settings = {"model": "m", "data": "intents.jsonl"}
    text = Page(render_report(*few_pictures(classification_run), "run", settings)).text
    assert "LoRA on sentence-transformers/all-MiniLM-L6-v2" in text
    assert "Trained on 480 rows of intents.jsonl" in text


def test_broken_settings_are_an_error_that_names_the_file(classification_run: Run, write_run: WriteRun) -> None:
    folder = write_run(*few_pictures(classification_run))
    (folder / "config.yaml").write_text("{")
    with pytest.raises(RunFolderError, match=r"config\.yaml' is not YAML"):
        write_report(folder)
