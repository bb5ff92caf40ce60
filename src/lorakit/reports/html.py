"""Run folder -> ``report.html``: one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import json
import os
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import RunFolderError, bullet_list
from lorakit.files import write_text
from lorakit.records import RunSummary, Sample, from_json
from lorakit.reports import comparison, figures, spectrum, wording
from lorakit.reports.theme import DARK, LIGHT, Theme

SUMMARY_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
_ENERGY_SHARE = 0.9


@dataclass(frozen=True)
class Picture:
    """One picture in its light and its dark colours, as data addresses, with its meaning in words."""

    light: str
    dark: str
    words: str


def read_run(run_folder: str | os.PathLike[str]) -> tuple[RunSummary, list[dict[str, Any]]]:
    """Read what a run left behind: its summary and the lines of its metrics.

    Raises:
        RunFolderError: the folder or a file is missing or broken; every problem found is named.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise RunFolderError(f"'{folder}' is not a run folder: {found}. Give the --output of `lorakit train`.")
    problems: list[str] = []
    summary = _read_summary(folder / SUMMARY_FILE, problems)
    metrics = _read_metrics(folder / METRICS_FILE, problems)
    if problems or summary is None:
        hint = "Give the --output of a `lorakit train` that has ended."
        raise RunFolderError(f"the run folder '{folder}' cannot be read: {bullet_list(problems)}\n{hint}")
    return summary, metrics


def _read_summary(file: Path, problems: list[str]) -> RunSummary | None:
    text = _read_text(file, problems)
    if text is None:
        return None
    try:
        return from_json(RunSummary, json.loads(text))
    except json.JSONDecodeError as error:
        problems.append(f"'{file.name}' is not JSON: {error}")
    except KeyError as error:
        problems.append(f"'{file.name}' lacks the field {error}")
    except (TypeError, ValueError) as error:
        problems.append(f"'{file.name}' is not a run's summary: {error}")
    return None


def _read_metrics(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, text in enumerate((_read_text(file, problems) or "").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            problems.append(f"'{file.name}', line {number} is not JSON: {error.msg}")
            continue
        missing = [] if isinstance(line, dict) else ["kind", "step", "loss"]
        missing = missing or [name for name in ("kind", "step", "loss") if name not in line]
        if missing:
            problems.append(f"'{file.name}', line {number} lacks {', '.join(missing)}")
        else:
            lines.append(line)
    return lines


def _read_text(file: Path, problems: list[str]) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"'{file.name}' is missing")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"'{file.name}' cannot be read: {error}")
    return None


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Raises:
        RunFolderError: the run folder is missing, incomplete or broken.
        TrainingError: the disk is full.
    """
    summary, metrics = read_run(run_folder)
    path = Path(run_folder) / REPORT_FILE
    write_text(path, render_report(summary, metrics, os.fspath(run_folder)))
    return path


def render_report(summary: RunSummary, metrics: list[dict[str, Any]], run_name: str) -> str:
    """Return the page; the same records give the same text.

    Args:
        summary: what the run reports.
        metrics: the lines of ``metrics.jsonl``.
        run_name: the run folder as the reader would type it in a command.
    """
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
    classes = comparison.is_classification(summary)
    mistakes = comparison.confusions(summary.after, summary.labels) if classes else []
    return environment.get_template("report.html.j2").render(
        summary=summary,
        classes=classes,
        method=wording.method_name(summary.method),
        settings=wording.method_settings(summary.method),
        headline=comparison.headline(summary),
        caution=comparison.caution(summary),
        tiles=_tiles(summary),
        models=[column for column, _ in comparison.models(summary)],
        measures=comparison.measures(summary),
        class_rows=comparison.class_rows(summary) if classes else [],
        facts=comparison.facts(summary),
        proof_lines=comparison.proof_lines(summary.proof),
        samples=[(sample, _is_right(sample) if classes else None) for sample in summary.samples],
        mistakes=mistakes,
        layers=[
            (layer, spectrum.rank_for_energy(layer.singular_values, _ENERGY_SHARE))
            for layer in spectrum.learned_layers(summary.spectra)
        ],
        layers_sentence=_layers_sentence(summary),
        pictures=_pictures(summary, metrics),
        commands=_commands(summary, run_name),
        snippet=_snippet(summary, run_name),
    )


def _tiles(summary: RunSummary) -> list[tuple[str, str, str]]:
    """Return the figures at the top of the page: name, value, and what it was before."""
    rows = {row.name: row.texts for row in comparison.measures(summary)}
    tiles = [(name, texts[-1], f"before: {texts[0]}") for name, texts in rows.items()]
    steps = wording.plural(summary.num_steps, "step")
    tiles.append(("training time", wording.duration(summary.seconds), steps))
    in_updates = wording.count(summary.num_trainable - summary.num_head)
    tiles.append(("adapter on disk", wording.size(summary.adapter_bytes), f"{in_updates} numbers"))
    return tiles


def _is_right(sample: Sample) -> bool:
    """Tell whether ``label (probability)`` names the expected label."""
    return sample.after == sample.expected or sample.after.rpartition(" (")[0] == sample.expected


def _layers_sentence(summary: RunSummary) -> str:
    layers = spectrum.learned_layers(summary.spectra)
    if not layers:
        return ""
    ranks = [layer.effective_rank for layer in layers]
    most = max(len(layer.singular_values) for layer in layers)
    enough = statistics.median_high(spectrum.rank_for_energy(layer.singular_values, _ENERGY_SHARE) for layer in layers)
    return (
        f"{wording.plural(len(layers), 'layer')} got an update of rank {most} at most. "
        f"Their effective rank lies between {min(ranks):.1f} and {max(ranks):.1f} "
        f"(median {statistics.median(ranks):.1f}); in the median layer, "
        f"{100 * _ENERGY_SHARE:.0f} % of the energy lies in {wording.plural(enough, 'singular value')}."
    )


def _pictures(summary: RunSummary, metrics: list[dict[str, Any]]) -> dict[str, Picture]:
    unit = figures.loss_unit(summary)
    found: dict[str, tuple[Callable[[Theme], bytes], str]] = {
        "loss": (
            lambda theme: figures.loss_curve(metrics, "svg", theme, unit),
            "Line chart of training and held-out loss by optimizer step; held-out loss was "
            f"{wording.decimal(summary.before.loss)} before and {wording.decimal(summary.after.loss)} after.",
        ),
        "scores": (
            lambda theme: figures.before_after_bars(summary, "svg", theme),
            "Bar chart of the scores before and after; the same numbers are in the tables.",
        ),
    }
    if summary.after.confusion:
        found["confusion"] = (
            lambda theme: figures.confusion_matrix(summary.after, summary.labels, "svg", theme),
            "Confusion matrix, rows truth and columns prediction.",
        )
    if summary.spectra:
        found["spectrum"] = (
            lambda theme: figures.singular_values(summary.spectra, "svg", theme),
            "Heat map of the singular values of every layer's update; the table below has the figures.",
        )
    return {name: Picture(_address(draw, LIGHT), _address(draw, DARK), words) for name, (draw, words) in found.items()}


def _address(draw: Callable[[Theme], bytes], theme: Theme) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(draw(theme)).decode("ascii")


def _commands(summary: RunSummary, run_name: str) -> list[tuple[str, str]]:
    """Return what to do next as (purpose, command)."""
    run = shlex.quote(run_name)
    merged = shlex.quote(f"{run_name.rstrip('/')}-merged")
    use = (
        ("label new rows", f"lorakit predict {run} rows.jsonl")
        if comparison.is_classification(summary)
        else ("write from a prompt", f'lorakit generate {run} "Your prompt"')
    )
    return [
        use,
        ("measure on other data", f"lorakit eval {run} test.jsonl"),
        ("make a plain model folder", f"lorakit merge {run} {merged}"),
    ]


def _snippet(summary: RunSummary, run_name: str) -> str:
    """Return Python that uses the merged folder with transformers alone."""
    merged = f"{run_name.rstrip('/')}-merged"
    if comparison.is_classification(summary):
        return (
            "from transformers import pipeline\n\n"
            f"classify = pipeline(\"text-classification\", {merged!r})\n"
            "print(classify(\"Your text\"))"
        )  # fmt: skip
    return (
        "from transformers import pipeline\n\n"
        f"write = pipeline(\"text-generation\", {merged!r})\n"
        "print(write(\"Your prompt\", max_new_tokens=64))"
    )  # fmt: skip
