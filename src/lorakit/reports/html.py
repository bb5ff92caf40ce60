"""Run folder -> ``report.html``: one page that needs no network, no script and no other file."""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError, RunFolderError, bullet_list
from lorakit.files import write_text
from lorakit.records import RunSummary, Sample, from_json
from lorakit.reports import comparison, costs, figures, page, spectrum, wording
from lorakit.reports.reproduction import CONFIG_FILE, reproduction
from lorakit.reports.theme import Theme
from lorakit.training.config import read_config

SUMMARY_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
_ENERGY_SHARE = 0.9


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


def read_settings(run_folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the settings of a run; None where the folder has none.

    Raises:
        RunFolderError: they are broken.
    """
    file = Path(run_folder) / CONFIG_FILE
    if not file.exists():
        return None
    try:
        return read_config(file)
    except ConfigError as error:
        raise RunFolderError(f"the run folder '{run_folder}' cannot be read: {error}") from None


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all, and return its path.

    Raises:
        RunFolderError: the run folder is missing, incomplete or broken.
        TrainingError: the disk is full.
    """
    summary, metrics = read_run(run_folder)
    settings = read_settings(run_folder)
    path = Path(run_folder) / REPORT_FILE
    write_text(path, render_report(summary, metrics, os.fspath(run_folder), settings))
    return path


def render_report(
    summary: RunSummary,
    metrics: list[dict[str, Any]],
    run_name: str,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the page; the same records give the same text.

    Args:
        summary: what the run reports.
        metrics: the lines of ``metrics.jsonl``.
        run_name: the run folder as the reader would type it in a command.
        settings: what ``config.yaml`` says; None where there is none.
    """
    classes = comparison.is_classification(summary)
    mistakes = comparison.confusions(summary.after, summary.labels) if classes else []
    warnings = comparison.warnings(metrics)
    warned = {text for _, text in warnings}
    caution = comparison.caution(summary)
    command, remark = reproduction(settings, run_name)
    return page.render(
        "report.html.j2",
        summary=summary,
        classes=classes,
        model=wording.model_name(summary.model),
        method=wording.method_name(summary.method),
        settings=wording.method_settings(summary.method),
        data=(settings or {}).get("data"),
        headline=comparison.headline(summary),
        caution=caution,
        tiles=_tiles(summary),
        models=[column for column, _ in comparison.models(summary)],
        measures=comparison.measures(summary),
        class_rows=comparison.class_rows(summary) if classes else [],
        facts=_facts(summary, metrics),
        probe=None if caution is not None else comparison.against_probe(summary),
        costs=costs.cost_rows(summary, metrics),
        cost_parts=costs.part_rows(metrics),
        cost_remark=costs.plan_remark(metrics),
        evaluation_names=comparison.evaluation_names(summary),
        evaluations=_evaluation_rows(summary, metrics),
        answers=comparison.answers_on_the_way(metrics),
        warnings=warnings,
        notes=[note for note in summary.notes if note not in warned],
        proof_lines=comparison.proof_lines(summary.proof),
        samples=[(sample, _is_right(sample) if classes else None) for sample in summary.samples],
        mistakes=mistakes,
        layers=[
            (layer, spectrum.rank_for_energy(layer.singular_values, _ENERGY_SHARE))
            for layer in spectrum.learned_layers(summary.spectra)
        ],
        layers_sentence=_layers_sentence(summary),
        pictures=_pictures(summary, metrics),
        reproduce=command,
        reproduce_remark=remark,
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


def _facts(summary: RunSummary, metrics: list[dict[str, Any]]) -> list[comparison.Fact]:
    """Return what the run cost, the measured time of a step behind the whole time."""
    facts = comparison.facts(summary)
    step_time = comparison.step_time(metrics)
    if step_time is not None:
        place = [fact.name for fact in facts].index("training time")
        facts.insert(place + 1, step_time)
    return facts


def _evaluation_rows(summary: RunSummary, metrics: list[dict[str, Any]]) -> list[tuple[str, str, list[str], bool]]:
    """Return every evaluation as (step, epoch, measures, whether it is the best), the base's first."""
    measured = comparison.evaluations(metrics)
    if not measured:
        return []
    best = comparison.best_step(summary, metrics)
    rows = [("before", "", comparison.evaluation_texts(summary, summary.before), False)]
    for line in measured:
        epoch = "" if line.epoch is None else wording.significant(line.epoch)
        texts = comparison.evaluation_texts(summary, line.found)
        rows.append((wording.count(line.step), epoch, texts, line.step == best))
    return rows


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


def _pictures(summary: RunSummary, metrics: list[dict[str, Any]]) -> dict[str, page.Picture]:
    unit, best = figures.loss_unit(summary), comparison.best_step(summary, metrics)
    found: dict[str, tuple[Callable[[Theme], bytes], str]] = {
        "loss": (
            lambda theme: figures.loss_curve(metrics, "svg", theme, unit, best),
            figures.loss_words(summary, metrics),
        ),
        "scores": (
            lambda theme: figures.before_after_bars(summary, "svg", theme),
            figures.score_words(summary),
        ),
    }
    if summary.after.confusion:
        found["confusion"] = (
            lambda theme: figures.confusion_matrix(summary.after, summary.labels, "svg", theme),
            figures.confusion_words(summary),
        )
    if summary.spectra:
        found["spectrum"] = (
            lambda theme: figures.singular_values(summary.spectra, "svg", theme),
            figures.spectrum_words(summary.spectra),
        )
    return {name: page.picture(draw, words) for name, (draw, words) in found.items()}


def _commands(summary: RunSummary, run_name: str) -> list[tuple[str, str]]:
    """Return what to do next as (purpose, command)."""
    run = shlex.quote(run_name)
    merged = shlex.quote(f"{run_name.rstrip('/')}-merged")
    use = (
        ("label new rows", f"lorakit predict {run} rows.jsonl")
        if comparison.is_classification(summary)
        else ("write from a prompt", f'lorakit generate {run} "Your prompt"')
    )
    go_on = [] if summary.finished else [("go on with the training", f"lorakit resume {run}")]
    return [
        *go_on,
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
