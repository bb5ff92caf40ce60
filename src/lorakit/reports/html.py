"""Run folder -> ``report.html``: one page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import json
import os
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, RunFolderError, bullet_list
from lorakit.files import write_text
from lorakit.methods import find_method
from lorakit.records import RunSummary, Sample, from_json
from lorakit.reports import comparison, figures, spectrum, wording
from lorakit.reports.theme import DARK, LIGHT, Theme
from lorakit.training.config import RunConfig, TrainConfig, read_config

if TYPE_CHECKING:
    from jinja2 import Template

SUMMARY_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
REPORT_FILE = "report.html"
_ENERGY_SHARE = 0.9
_NOT_AS_FLAGS = ("method", "rank", "alpha", "output", "force")


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
    command, remark = reproduction(settings, run_name)
    return _template().render(
        summary=summary,
        classes=classes,
        method=wording.method_name(summary.method),
        settings=wording.method_settings(summary.method),
        data=(settings or {}).get("data"),
        headline=comparison.headline(summary),
        caution=comparison.caution(summary),
        tiles=_tiles(summary),
        models=[column for column, _ in comparison.models(summary)],
        measures=comparison.measures(summary),
        class_rows=comparison.class_rows(summary) if classes else [],
        facts=_facts(summary, metrics),
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


def _template() -> Template:
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
    return environment.get_template("report.html.j2")


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


def _pictures(summary: RunSummary, metrics: list[dict[str, Any]]) -> dict[str, Picture]:
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
    return {name: Picture(_address(draw, LIGHT), _address(draw, DARK), words) for name, (draw, words) in found.items()}


def _address(draw: Callable[[Theme], bytes], theme: Theme) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(draw(theme)).decode("ascii")


def reproduction(settings: Mapping[str, Any] | None, run_name: str) -> tuple[str | None, str]:
    """Return the command that trains with the same settings, quoted for a shell, and a remark on it.

    Where a setting has no flag, the command names the run's own file of settings. Without a command (None) the
    remark says why.
    """
    if settings is None:
        return None, f"This run folder has no {CONFIG_FILE}, so the command is not known."
    try:
        config = RunConfig(**settings)
    except ConfigError as error:
        return None, f"{CONFIG_FILE} does not fit this version of lorakit: {error}"
    if config.model is None or config.data is None:
        return None, "The model or the rows were given as Python objects, so no command says this run."
    flags = _flags(config)
    words = ["train", config.model, config.data, *(flags or ())]
    if flags is None or config.model.startswith("-") or config.data.startswith("-"):
        words = ["train", "--config", os.path.join(run_name, CONFIG_FILE)]
    return shlex.join(["lorakit", *words]), "Trains into a new folder below runs; --output names another."


def _flags(config: RunConfig) -> list[str] | None:
    """Return the settings that differ from the defaults as flags of ``lorakit train``; None if one has no flag."""
    found = _method_flags(config)
    if found is None:
        return None
    for name, field in TrainConfig.model_fields.items():
        value = getattr(config, name)
        if name in _NOT_AS_FLAGS or value == field.get_default(call_default_factory=True):
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
            continue
        text = _flag_text(name, value)
        if text is None:
            return None
        found += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return found


def _method_flags(config: RunConfig) -> list[str] | None:
    """Return name, rank and alpha of the method as flags; None where its other fields are not the usual ones."""
    try:
        wanted = config.resolved_method().summary()
        usual = find_method(str(wanted["name"])).summary()
        changed = {name: wanted[name] for name in ("rank", "alpha") if wanted.get(name) != usual.get(name)}
        if find_method({"name": wanted["name"], **changed}).summary() != wanted:
            return None
    except ConfigError:
        return None
    method = [] if wanted["name"] == TrainConfig.model_fields["method"].default else ["--method", str(wanted["name"])]
    return [*method, *(word for name, value in changed.items() for word in (f"--{name}", _number(value)))]


def _flag_text(name: str, value: Any) -> str | None:
    """Write a value as the flag reads it; None where no flag does."""
    if name == "halve_micro_at":
        return None
    if name == "columns":
        return _listed([f"{field}={column}" for field, column in value.items()])
    if name == "train_modules" and isinstance(value, list):
        return _listed(value)
    if isinstance(value, list) or name == "train_modules":
        return None
    return _number(value) if isinstance(value, float) else str(value)


def _listed(items: list[str]) -> str | None:
    """Write items parted by commas; None where they would not be read back as they are."""
    whole = items and all(item and item == item.strip() and "," not in item for item in items)
    return ",".join(items) if whole else None


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


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
