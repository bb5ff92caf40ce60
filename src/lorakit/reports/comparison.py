"""What a run's summary says, as plain rows: the terminal and the page show the same ones."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.records import Evaluation, Proof, RunSummary, Sample, from_json
from lorakit.reports import wording


@dataclass(frozen=True)
class Column:
    """One of the models compared: its name, and a remark that keeps the comparison fair."""

    name: str
    remark: str


@dataclass(frozen=True)
class Row:
    """One measure of every model.

    Attributes:
        name: the measure, with its unit.
        texts: one value a column, as written.
        best: index of the best column; None where fewer than two have a value.
    """

    name: str
    texts: tuple[str, ...]
    best: int | None


@dataclass(frozen=True)
class Measured:
    """One evaluation on the way.

    Attributes:
        step: optimizer steps before it; ``epoch`` passes over the rows, where that was written down.
        found: what was measured.
        samples: held-out rows as they were answered then.
    """

    step: int
    epoch: float | None
    found: Evaluation
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Answers:
    """One held-out row, and its answers in the order of the run as (when, answer)."""

    input: str
    expected: str
    given: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ClassRow:
    """F1 of one class before and after; ``change`` in F1."""

    label: str
    support: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class Fact:
    """A named figure of the run and what it counts."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class ProofLine:
    """One check: passed, failed, or (None) not made."""

    claim: str
    passed: bool | None
    detail: str


def is_classification(summary: RunSummary) -> bool:
    """Tell whether rows have one label each; otherwise tokens are predicted."""
    return summary.task == "classification"


def models(summary: RunSummary) -> list[tuple[Column, Evaluation]]:
    """List the evaluations to compare, the base first and the adapted model last."""
    if not is_classification(summary):
        return [(Column("base", "before"), summary.before), (Column("adapted", "after"), summary.after)]
    base = Column("base", "random head" if summary.num_head else "its own head")
    found: list[tuple[Column, Evaluation]] = [(base, summary.before)]
    if summary.majority is not None:
        found.append((Column("majority class", "always the same"), summary.majority))
    if summary.probe is not None:
        found.append((Column("linear probe", "on frozen base"), summary.probe))
    found.append((Column("adapted", "after"), summary.after))
    return found


def measures(summary: RunSummary) -> list[Row]:
    """List the measures of the task, one text for each of ``models(summary)``."""
    evaluations = [evaluation for _, evaluation in models(summary)]
    accuracies = [evaluation.accuracy for evaluation in evaluations]
    losses = [evaluation.loss for evaluation in evaluations]
    if is_classification(summary):
        macro = [evaluation.macro_f1 for evaluation in evaluations]
        return [
            _row("accuracy", accuracies, tuple(map(wording.percent, accuracies)), highest=True),
            _row("macro F1", macro, tuple(map(wording.decimal, macro)), highest=True),
            _row("loss (nats/row)", losses, tuple(map(wording.decimal, losses)), highest=False),
        ]
    perplexities = [perplexity(evaluation) for evaluation in evaluations]
    return [
        _row("loss (nats/token)", losses, tuple(map(wording.decimal, losses)), highest=False),
        _row("perplexity", perplexities, tuple(map(wording.significant, perplexities)), highest=False),
        _row("token accuracy", accuracies, tuple(map(wording.percent, accuracies)), highest=True),
    ]


def _row(name: str, values: list[float | None] | list[float], texts: tuple[str, ...], highest: bool) -> Row:
    known = [
        (value if highest else -value, index)
        for index, value in enumerate(values)
        if value is not None and not math.isnan(value)
    ]
    return Row(name, texts, max(known)[1] if len(known) > 1 else None)


def evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """List the evaluations among the lines of ``metrics.jsonl``, in their order."""
    return [
        Measured(
            line["step"],
            line.get("epoch"),
            from_json(Evaluation, {"num_rows": 0, **line}),
            tuple(from_json(Sample, sample) for sample in line.get("samples", ())),
        )
        for line in metrics
        if line["kind"] == "eval" and line["loss"] is not None
    ]


def best_step(summary: RunSummary, metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step of the best evaluation, the first of equals.

    Classifiers are compared by accuracy and then by loss, others by loss, as the training does that keeps the best.
    """

    def goodness(found: Evaluation) -> tuple[float, ...]:
        return (found.accuracy or 0.0, -found.loss) if is_classification(summary) else (-found.loss,)

    finite = [measured for measured in evaluations(metrics) if math.isfinite(measured.found.loss)]
    return max(finite, key=lambda measured: goodness(measured.found)).step if finite else None


def evaluation_names(summary: RunSummary) -> list[str]:
    """Name the measures of ``evaluation_texts``."""
    return [row.name for row in measures(summary)]


def evaluation_texts(summary: RunSummary, found: Evaluation) -> list[str]:
    """Write one evaluation, a text for each of ``evaluation_names(summary)``."""
    if is_classification(summary):
        return [wording.percent(found.accuracy), wording.decimal(found.macro_f1), wording.decimal(found.loss)]
    return [
        wording.decimal(found.loss),
        wording.significant(perplexity(found)),
        wording.percent(found.accuracy),
    ]


def answers_on_the_way(metrics: Sequence[Mapping[str, Any]]) -> list[Answers]:
    """List the held-out rows that were answered at evaluations, each with what was answered before and when."""
    given: dict[tuple[int, str, str], list[tuple[str, str]]] = {}
    for measured in evaluations(metrics):
        for number, sample in enumerate(measured.samples):
            row = given.setdefault((number, sample.input, sample.expected), [("before", sample.before)])
            row.append((f"step {wording.count(measured.step)}", sample.after))
    return [Answers(input_, expected, tuple(row)) for (_, input_, expected), row in given.items()]


def warnings(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """List what the training warned of as (step, text)."""
    return [(line["step"], str(line["text"])) for line in metrics if line["kind"] == "warning" and "text" in line]


def step_time(metrics: Sequence[Mapping[str, Any]]) -> Fact | None:
    """Return the measured time of an optimizer step, from the time that had passed at each; None without any."""
    passed = [0.0, *(line["seconds"] for line in metrics if line["kind"] == "train" and "seconds" in line)]
    taken = [after - before for before, after in itertools.pairwise(passed)]
    if not taken:
        return None
    number = wording.plural(len(taken), "step")
    slowest = f"median of {number}; the slowest took {wording.significant(max(taken))} s"
    return Fact("time per step", f"{wording.significant(statistics.median(taken))} s", slowest)


def perplexity(evaluation: Evaluation) -> float | None:
    """Return the perplexity of an evaluation over tokens, ``exp(loss)``."""
    if evaluation.perplexity is not None:
        return evaluation.perplexity
    return math.exp(min(evaluation.loss, 700.0)) if evaluation.num_tokens else None


def class_rows(summary: RunSummary) -> list[ClassRow]:
    """List F1 of every class before and after, in label order."""
    before = {score.label: score.f1 for score in summary.before.classes}
    return [
        ClassRow(score.label, score.support, before.get(score.label, 0.0), score.f1) for score in summary.after.classes
    ]


def facts(summary: RunSummary) -> list[Fact]:
    """List what the run cost. The adapter's share never counts the head."""
    in_updates = summary.num_trainable - summary.num_head
    share = in_updates / summary.num_base if summary.num_base else None
    found = [
        Fact(
            "trained in the adapter",
            wording.plural(in_updates, "number"),
            f"{wording.percent(share)} of the base's {wording.count(summary.num_base)}, all of them frozen",
        )
    ]
    if summary.num_head:
        head = wording.plural(summary.num_head, "number")
        found.append(Fact("trained in full (head)", head, "not in the share above"))
    steps = f"{wording.plural(summary.num_steps, 'step')}, {summary.num_epochs:.3g} epochs"
    found += [
        Fact("training", steps, f"on {wording.plural(summary.num_train_rows, 'row')}"),
        Fact(
            "training time",
            wording.duration(summary.seconds),
            f"{wording.count(summary.tokens_per_s)} tokens/s",
        ),
    ]
    if summary.peak_memory_bytes is not None:
        peak = wording.mebibytes(summary.peak_memory_bytes)
        found.append(Fact("peak memory", peak, "above the loaded model"))
    found += [
        Fact("adapter on disk", wording.size(summary.adapter_bytes)),
        Fact("held-out data", *_held_out(summary)),
    ]
    return found


def _held_out(summary: RunSummary) -> tuple[str, str]:
    after = summary.after
    if not is_classification(summary):
        return wording.plural(after.num_rows, "row"), wording.plural(after.num_tokens or 0, "supervised token")
    rows = wording.plural(after.num_rows, "row")
    if after.accuracy is None or not after.num_rows:
        return rows, ""
    low, high = wilson_interval(after.accuracy, after.num_rows)
    return rows, f"accuracy's 95 % interval {100 * low:.1f} to {100 * high:.1f} %"


def wilson_interval(share: float, num_rows: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of a share seen on ``num_rows`` rows (Wilson 1927); z = 1.96 covers 95 %.

    >>> low, high = wilson_interval(0.9, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    spread = z * z / num_rows
    center = (share + spread / 2.0) / (1.0 + spread)
    half = z / (1.0 + spread) * math.sqrt(share * (1.0 - share) / num_rows + spread / (4.0 * num_rows))
    return max(0.0, center - half), min(1.0, center + half)


def proof_lines(proof: Proof | None) -> list[ProofLine]:
    """List the checks made on the trained model; a check that was not made says so."""
    if proof is None:
        return [ProofLine("base untouched", None, "not checked in this run")]
    digest = f"sha256 {proof.digest[:12]}"
    changed = f"{digest} before = after" if proof.base_unchanged else f"the base changed: now {digest}"
    lines = [ProofLine("base untouched", proof.base_unchanged, changed)]
    difference, tolerance = proof.merged_max_difference, proof.merged_tolerance
    if difference is None or tolerance is None:
        lines.append(ProofLine("merged = unmerged", None, "not checked in this run"))
    else:
        fits = difference <= tolerance
        sign = "≤" if fits else ">"
        text = f"max |d| {difference:.2g} {sign} tolerance {tolerance:.2g}"
        lines.append(ProofLine("merged = unmerged", fits, text))
    if proof.disabled_equals_base is None:
        lines.append(ProofLine("disabled = base", None, "not checked in this run"))
    else:
        equal = "bit for bit" if proof.disabled_equals_base else "outputs differ with the adapter off"
        lines.append(ProofLine("disabled = base", proof.disabled_equals_base, equal))
    return lines


def headline(summary: RunSummary) -> str:
    """Say the result in one sentence, the weaker comparisons included."""
    before, after = summary.before, summary.after
    if not is_classification(summary):
        was, now = perplexity(before), perplexity(after)
        verb = "fell" if after.loss < before.loss else ("rose" if after.loss > before.loss else "stayed")
        return (
            f"Perplexity on {wording.plural(after.num_tokens or 0, 'held-out token')} {verb} from "
            f"{wording.significant(was)} to {wording.significant(now)} "
            f"(loss {wording.decimal(before.loss)} to {wording.decimal(after.loss)} nats per token)."
        )
    head = "the base with a random head" if summary.num_head else "the base"
    others = [f"{wording.percent(before.accuracy)} for {head}"]
    if summary.majority is not None:
        others.append(f"{wording.percent(summary.majority.accuracy)} for always the most frequent class")
    if summary.probe is not None:
        others.append(f"{wording.percent(summary.probe.accuracy)} for a linear probe on the frozen base")
    listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
    return (
        f"The adapted model labels {wording.percent(after.accuracy)} of "
        f"{wording.plural(after.num_rows, 'held-out row')} correctly, against {listed}."
    )


def in_one_line(summary: RunSummary) -> str:
    """Say the result and what it took on one line."""
    first = measures(summary)[0]
    steps = wording.plural(summary.num_steps, "step")
    return (
        f"{first.name}: {first.texts[0]} before, {first.texts[-1]} after {steps} in {wording.duration(summary.seconds)}"
    )


def caution(summary: RunSummary) -> str | None:
    """Say so where the adapter did not pay: it is no better than the base or than a linear probe."""
    before, after, probe = summary.before, summary.after, summary.probe
    if not is_classification(summary):
        return None if after.loss < before.loss else "The loss did not fall: this adapter does not help on this data."
    if after.accuracy is None:
        return None
    if probe is not None and probe.accuracy is not None and after.accuracy <= probe.accuracy:
        return f"{against_probe(summary)} This adapter does not pay on this data."
    if before.accuracy is not None and after.accuracy <= before.accuracy:
        return "The accuracy did not rise: this adapter does not help on this data."
    return None


def against_probe(summary: RunSummary) -> str | None:
    """Say whether a linear probe is better than the adapter, as good or worse, by how much; None without a probe."""
    after, probe = summary.after, summary.probe
    if probe is None or probe.accuracy is None or after.accuracy is None:
        return None
    if probe.accuracy == after.accuracy:
        both = wording.percent(probe.accuracy)
        return f"A linear probe on the frozen base does as well: both label {both} of the held-out rows correctly."
    difference = abs(after.accuracy - probe.accuracy)
    word = "better" if probe.accuracy > after.accuracy else "worse"
    figures = f"{wording.percent(probe.accuracy)} against {wording.percent(after.accuracy)}"
    by = f"{wording.plural(round(difference * after.num_rows), 'row')} of {wording.count(after.num_rows)}"
    low, high = wilson_interval(after.accuracy, max(1, after.num_rows))
    chance = "; so few rows may be chance" if low <= probe.accuracy <= high else ""
    return f"A linear probe on the frozen base does {word}: {figures}, a difference of {by}{chance}."


def confusions(evaluation: Evaluation, labels: tuple[str, ...], limit: int = 5) -> list[tuple[str, str, int]]:
    """List the most frequent mistakes as (truth, prediction, rows), largest first."""
    mistakes = [
        (labels[truth], labels[predicted], rows)
        for truth, counts in enumerate(evaluation.confusion)
        for predicted, rows in enumerate(counts)
        if rows and truth != predicted
    ]
    return sorted(mistakes, key=lambda mistake: -mistake[2])[:limit]
