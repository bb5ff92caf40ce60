from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from lorakit.records import ClassScore, Evaluation, Proof, RunSummary, Sample
from lorakit.reports import comparison, wording
from lorakit.reports.tables import choices_table, evaluation_table, samples_table, summary_table

Run = tuple[RunSummary, list[dict[str, Any]]]


def shown(renderable: RenderableType, width: int = 80, terminal: bool = False) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None).print(
        renderable
    )
    return output.getvalue()


def test_the_summary_names_every_model_and_every_class(classification_run: Run) -> None:
    text = shown(summary_table(classification_run[0]))
    for words in ("random head", "majority class", "linear probe", "adapted", *classification_run[0].labels):
        assert words in text


def test_the_summary_shows_every_measure_of_every_model(classification_run: Run) -> None:
    summary = classification_run[0]
    lines = shown(summary_table(summary)).splitlines()
    for row in comparison.measures(summary):
        line = next(line for line in lines if row.name in line)
        assert line.split()[-1] == row.texts[-1].split()[-1]
        assert all(text in line for text in row.texts)


def test_the_share_of_the_adapter_does_not_count_the_head(classification_run: Run) -> None:
    text = shown(summary_table(classification_run[0]), width=120)
    assert "737,280 numbers" in text  # 740,360 trained less 3,080 of the head
    assert "3.25 % of the base's 22,713,216" in text
    assert "3,080 numbers" in text


def test_memory_is_left_out_where_it_is_not_known(classification_run: Run) -> None:
    assert "peak memory" not in shown(summary_table(replace(classification_run[0], peak_memory_bytes=None)))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(classification_run: Run, generation_run: Run, width: int) -> None:
    for summary in (classification_run[0], generation_run[0]):
        tables = (
            summary_table(summary),
            samples_table(summary.samples),
            choices_table(summary.choices),
            evaluation_table(summary.after, summary.labels),
        )
        assert all(len(line) <= width for table in tables for line in shown(table, width).splitlines())


def test_every_model_and_number_fits_80_columns(classification_run: Run) -> None:
    text = shown(summary_table(classification_run[0]), width=80)
    assert "…" not in text


def test_piped_output_has_no_escape_codes(classification_run: Run) -> None:
    assert "\x1b" not in shown(summary_table(classification_run[0]))


def test_tokens_are_compared_by_loss_perplexity_and_accuracy(generation_run: Run) -> None:
    text = shown(summary_table(generation_run[0]))
    for words in ("3.532", "1.301", "34.2", "3.67", "35.2 %", "67.4 %"):
        assert words in text
    assert "majority" not in text


def test_missing_baselines_leave_no_column(classification_run: Run) -> None:
    text = shown(summary_table(replace(classification_run[0], majority=None, probe=None)))
    assert "majority" not in text
    assert "linear probe" not in text


def test_an_interrupted_run_says_so(classification_run: Run) -> None:
    assert "Interrupted" in shown(summary_table(replace(classification_run[0], finished=False)))


def test_an_adapter_no_better_than_the_probe_says_so(classification_run: Run) -> None:
    summary = classification_run[0]
    assert "does not pay" not in shown(summary_table(summary))
    assert "does not pay" in shown(summary_table(replace(summary, probe=summary.after)))


def test_a_failed_proof_is_told_in_words(classification_run: Run) -> None:
    failed = Proof(False, "ab" * 32, merged_max_difference=0.5, merged_tolerance=1e-5, disabled_equals_base=False)
    lines = shown(summary_table(replace(classification_run[0], proof=failed))).splitlines()
    for claim in ("base untouched", "merged = unmerged", "disabled = base"):
        assert "NO" in next(line for line in lines if claim in line)


@pytest.mark.parametrize("proof", [None, Proof(True, "ab" * 32)])
def test_a_check_that_was_not_made_is_not_called_passed(classification_run: Run, proof: Proof | None) -> None:
    assert "not checked" in shown(summary_table(replace(classification_run[0], proof=proof)))


def test_markup_and_escape_codes_of_the_data_are_shown_as_text(classification_run: Run) -> None:
    hostile = Sample("[bold]hello[/bold] \x1b[31mred", "[red]a", "b (0.5)", "[red]a (0.9)")
    text = shown(samples_table([hostile]), width=120)
    assert "[bold]hello[/bold]" in text
    assert "[red]a (0.9)" in text
    assert "\x1b" not in text


def test_a_hostile_label_is_shown_as_text() -> None:
    score = ClassScore("[/nope]\x1b[2J", 1.0, 1.0, 1.0, 3)
    evaluation = Evaluation(0.1, 3, accuracy=1.0, macro_f1=1.0, classes=(score,), confusion=((3,),))
    text = shown(evaluation_table(evaluation, [score.label]))
    assert "[/nope]" in text
    assert "\x1b" not in text


def test_long_answers_are_stacked_below_each_other(generation_run: Run) -> None:
    text = shown(samples_table(generation_run[0].samples))
    assert [line.split()[0] for line in text.splitlines() if line.split()[:1] != []].count("expected") == 1
    assert "The Vaults serves Italian food in the riverside area." in text


def test_the_evaluation_lists_the_most_frequent_mistake_first() -> None:
    confusion = ((5, 1, 0), (0, 4, 3), (0, 0, 6))
    evaluation = Evaluation(0.4, 19, accuracy=15 / 19, macro_f1=0.8, confusion=confusion)
    mistakes = comparison.confusions(evaluation, ("a", "b", "c"))
    assert mistakes == [("b", "c", 3), ("a", "b", 1)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_the_best(classification_run: Run, loss: float) -> None:
    summary = replace(classification_run[0], after=replace(classification_run[0].after, loss=loss))
    row = next(row for row in comparison.measures(summary) if "loss" in row.name)
    assert row.best != len(row.texts) - 1


@pytest.mark.parametrize(
    ("adapted", "probe", "words"),
    [
        (0.9, 0.9, "A linear probe on the frozen base does as well: both label 90.0 % of the held-out rows correctly."),
        (
            0.6,
            0.9,
            "A linear probe on the frozen base does better: 90.0 % against 60.0 %, a difference of 150 rows of 500.",
        ),
        (
            0.9,
            0.6,
            "A linear probe on the frozen base does worse: 60.0 % against 90.0 %, a difference of 150 rows of 500.",
        ),
        (
            0.898,
            0.9,
            "A linear probe on the frozen base does better: 90.0 % against 89.8 %, a difference of 1 row of 500; "
            "so few rows may be chance.",
        ),
    ],
)
def test_a_linear_probe_is_called_what_it_is(classification_run: Run, adapted: float, probe: float, words: str) -> None:
    after = replace(classification_run[0].after, accuracy=adapted, num_rows=500)
    summary = replace(classification_run[0], after=after, probe=replace(after, accuracy=probe))
    assert comparison.against_probe(summary) == words


@pytest.mark.parametrize(("adapted", "pays"), [(0.95, True), (0.9, False), (0.8, False)])
def test_an_adapter_pays_only_where_it_beats_the_probe(classification_run: Run, adapted: float, pays: bool) -> None:
    after = replace(classification_run[0].after, accuracy=adapted)
    summary = replace(classification_run[0], after=after, probe=replace(after, accuracy=0.9))
    caution = comparison.caution(summary)
    assert (caution is None) == pays
    assert pays or "does not pay" in str(caution)


def test_many_patterns_are_written_as_a_range() -> None:
    ranks = {f"layer{i}": i + 1 for i in range(9)}
    method = {"name": "lora", "rank": 2, "rank_pattern": ranks, "alpha_pattern": {"up": 3.0}}
    assert wording.method_settings(method) == "rank 2, rank_pattern 1 to 9 by 9 patterns, alpha_pattern {'up': 3.0}"
