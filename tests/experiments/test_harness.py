"""The experiments' own machinery: what resumes, how budgets are met, what the tables say."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from experiments.budgets import WITHIN, match, raised  # noqa: E402
from experiments.gate import Found, Gate  # noqa: E402
from experiments.gate_results import (  # noqa: E402
    Line,
    append_line,
    beside_text,
    found_for,
    gates_page,
    number,
    read_lines,
    source_key,
    verdict,
)
from experiments.method_results import (  # noqa: E402
    BEGIN,
    END,
    Scored,
    against,
    best_rate,
    picture,
    put_between,
    table,
)
from experiments.method_runs import Candidate, Result, Task, candidates, with_ranks  # noqa: E402
from experiments.run_methods import job, run_all, tasks_of, widened  # noqa: E402

from lorakit.methods import find_method  # noqa: E402
from lorakit.methods.lora import LoRA  # noqa: E402

# Gates -----------------------------------------------------------------------------------------------


def gate(passes: bool = True, seeds: int = 3, needed: int = 3) -> Gate:
    small = (lambda value: value <= 1.0) if passes else None
    return Gate("lora", "It is small.", "<= 1", lambda seed: Found(float(seed)), small, seeds, needed)


def test_what_was_measured_comes_back_by_seed(tmp_path: Path) -> None:
    file = tmp_path / "results/gates.jsonl"
    for seed in (1, 0):
        append_line(file, Line("key", "It is small.", seed, 0.5 + seed, {"LoRA": 2.0}))
    assert found_for(read_lines(file), "key", gate()) == {0: Found(0.5, {"LoRA": 2.0}), 1: Found(1.5, {"LoRA": 2.0})}


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "gates.jsonl"
    append_line(file, Line("key", "It is small.", 0, 0.5))
    with file.open("a", encoding="utf-8") as out:
        out.write('{"key": "key", "gate": "It is sm')
    assert [line.seed for line in read_lines(file)] == [0]


def test_a_changed_gate_file_has_another_key(tmp_path: Path) -> None:
    file = tmp_path / "experiments/gates/one.py"
    file.parent.mkdir(parents=True)
    file.write_text("first", encoding="utf-8")
    before = source_key(file, tmp_path)
    assert source_key(file, tmp_path) == before
    file.write_text("second", encoding="utf-8")
    assert source_key(file, tmp_path) != before


def test_changed_code_of_a_method_has_another_key(tmp_path: Path) -> None:
    gate_file, method = tmp_path / "experiments/gates/one.py", tmp_path / "src/lorakit/methods/one.py"
    for file in (gate_file, method):
        file.parent.mkdir(parents=True)
        file.write_text("first", encoding="utf-8")
    before = source_key(gate_file, tmp_path)
    method.write_text("second", encoding="utf-8")
    assert source_key(gate_file, tmp_path) != before


@pytest.mark.parametrize(
    ("values", "needed", "expected"),
    [
        ((0.1, 0.2, 0.3), 3, "pass"),
        ((0.1, 0.2, 1.3), 3, "FAIL"),
        ((0.1, 0.2, 1.3), 2, "pass"),
        ((0.1, 0.2), 2, "not run"),
        ((math.nan, 0.2, 0.3), 3, "FAIL"),
    ],
)
def test_a_claim_holds_where_enough_seeds_meet_it(values: tuple[float, ...], needed: int, expected: str) -> None:
    found = {seed: Found(value) for seed, value in enumerate(values)}
    assert verdict(gate(needed=needed), found) == expected


def test_what_promises_nothing_is_reported() -> None:
    assert verdict(gate(passes=False), {seed: Found(9.0) for seed in range(3)}) == "reported"


def test_figures_beside_are_ranges_over_the_seeds() -> None:
    assert (
        beside_text({0: Found(1, {"LoRA": 0.5, "bound": 2}), 1: Found(1, {"LoRA": 0.75})})
        == "LoRA 0.5 to 0.75; bound 2"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.0, "1,234"), (0.98765, "0.988"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_figures_are_written_with_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_page_shows_values_verdict_and_source() -> None:
    page = gates_page([(gate(), {seed: Found(0.25 * seed) for seed in range(3)})])
    assert "| It is small. | <= 1 | 0, 0.25, 0.5 |" in page
    assert "| pass |" in page
    assert "Of 1 claims 1 pass." in page


GATE_FILE = """
from experiments.gate import Found, Gate

def measure(seed):
    with open({log!r}, "a") as out:
        out.write(f"{{seed}} ")
    if seed == {breaks_at}:
        raise KeyboardInterrupt
    return Found(float(seed))

GATES = [Gate("mine", "It counts.", "<= 9", measure, lambda value: value <= 9)]
"""


def test_an_interrupted_gate_goes_on_with_the_next_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import experiments.run_gates as runner

    log, results = tmp_path / "log", tmp_path / "gates.jsonl"
    made: dict[str, object] = {}
    exec(GATE_FILE.format(log=str(log), breaks_at=1), made)
    monkeypatch.setattr(runner, "gates_of", lambda file: made["GATES"])
    with pytest.raises(KeyboardInterrupt):
        runner.measure(tmp_path / "mine.py", "key", results)
    exec(GATE_FILE.format(log=str(log), breaks_at=-1), made)
    runner.measure(tmp_path / "mine.py", "key", results)
    assert log.read_text() == "0 1 1 2 "


# Budgets ---------------------------------------------------------------------------------------------

SIZES = {"a": 10, "b": 14, "c": 30}


def lora_numbers(rank: int) -> dict[str, int]:
    return {path: rank * size for path, size in SIZES.items()}


def dora_numbers(rank: int) -> dict[str, int]:
    return {path: rank * size + size // 2 for path, size in SIZES.items()}


def vera_numbers(rank: int) -> dict[str, int]:
    return {path: rank + size // 2 for path, size in SIZES.items()}


def test_the_reference_meets_its_own_budget() -> None:
    found = match(lora_numbers, 8 * 54, most=64, mixes=True)
    assert (found.rank, found.numbers, found.within, found.higher) == (8, 8 * 54, True, ())


@pytest.mark.parametrize("budget", [54 * rank for rank in (3, 4, 8, 16)])
def test_layers_of_two_ranks_meet_a_budget_that_one_rank_misses(budget: int) -> None:
    found = match(dora_numbers, budget, most=64, mixes=True)
    numbers = sum((dora_numbers(found.rank + (path in found.higher)))[path] for path in SIZES)
    assert numbers == found.numbers
    assert abs(numbers - budget) <= WITHIN * budget


def test_a_budget_out_of_reach_is_said_to_be() -> None:
    found = match(vera_numbers, 8 * 54, most=64, mixes=False)
    assert (found.rank, found.within) == (64, False)


@pytest.mark.parametrize("budget", range(60, 600, 37))
def test_no_other_rank_is_nearer_to_the_budget(budget: int) -> None:
    found = match(lora_numbers, budget, most=32, mixes=False)
    nearest = min(abs(sum(lora_numbers(rank).values()) - budget) for rank in range(1, 33))
    assert abs(found.numbers - budget) == nearest


def test_layers_are_raised_only_while_that_brings_the_sum_nearer() -> None:
    assert raised({"a": 10, "b": 10}, {"a": 20, "b": 11}, 22) == ("b",)


def test_layers_of_two_ranks_have_one_factor() -> None:
    found = match(dora_numbers, 8 * 54, most=64, mixes=True)
    assert found.higher
    method = find_method(with_ranks(Candidate("dora", {"name": "dora"}), found))
    assert isinstance(method, LoRA)
    assert {path: method.rank_at(path) for path in SIZES} == {p: found.rank + (p in found.higher) for p in SIZES}
    assert {method.scale_at(path) for path in SIZES} == {2.0}


def test_every_registered_method_is_compared() -> None:
    from lorakit.methods import method_names

    have, _ = candidates()
    assert set(method_names()) <= {one.fields["name"] for one in have}


# Runs and tables -------------------------------------------------------------------------------------

TASK = Task("trec", "TREC", "model", "train", "test", 10, 5, 5, 3, 2, "accuracy")
LOSSES = Task("e2e", "E2E", "model", "train", "test", 10, 5, 5, 3, 2, "perplexity")


def result(score: float | None, **fields: object) -> Result:
    return Result(held=score, test=score, numbers=100, file_bytes=2048, peak_bytes=2**20, **fields)  # type: ignore[arg-type]


def scored(name: str, *scores: float | None, within: bool | None = True) -> Scored:
    return Scored(name, 1e-3, "", tuple(result(score) for score in scores), within)


def test_a_run_that_has_a_result_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(tmp_path, TASK, "lora", {"name": "lora"}, 1e-3, 0)
    one.file.parent.mkdir(parents=True)
    one.file.write_text('{"held": 1.0, "test": 2.0}', encoding="utf-8")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    run_all([one], 1)
    assert one.result == Result(held=1.0, test=2.0)


@pytest.mark.parametrize("changed", [{"lr": 2e-3}, {"seed": 1}, {"fields": {"name": "dora"}}])
def test_another_run_has_a_file_of_its_own(tmp_path: Path, changed: dict[str, object]) -> None:
    given: dict[str, object] = {"fields": {"name": "lora"}, "lr": 1e-3, "seed": 0}
    first, second = (job(tmp_path, TASK, "lora", **each) for each in (given, {**given, **changed}))  # type: ignore[arg-type]
    assert first.file != second.file


def test_the_rate_is_the_best_on_held_out_rows_and_never_one_that_broke_off() -> None:
    by_rate = {1e-3: result(80.0), 2e-3: result(90.0), 4e-3: result(85.0), 8e-3: result(None)}
    assert best_rate(TASK, by_rate) == (2e-3, "")


def test_a_rate_at_the_edge_of_the_grid_is_said() -> None:
    assert best_rate(LOSSES, {1e-3: result(9.0), 2e-3: result(8.0)}) == (2e-3, "highest rate of the grid")


@pytest.mark.parametrize(
    ("best", "grid"),
    [
        (2e-3, [5e-4, 2e-3, 8e-3]),
        (8e-3, [5e-4, 2e-3, 8e-3, 3.2e-2]),
        (5e-4, [1.25e-4, 5e-4, 2e-3, 8e-3]),
    ],
)
def test_a_grid_grows_where_its_best_rate_is_at_an_end(best: float, grid: list[float]) -> None:
    assert widened([5e-4, 2e-3, 8e-3], best) == grid


@pytest.mark.parametrize(
    ("scores", "task", "expected"),
    [
        ((93.0, 93.1, 92.9), TASK, "better"),
        ((90.6, 90.9, 90.0), TASK, "no difference"),
        ((80.0, 80.1, 79.9), TASK, "worse"),
        ((80.0, 80.1, 79.9), LOSSES, "better"),
        ((93.0,), TASK, "not known"),
        ((None, None, None), TASK, "not known"),
    ],
)
def test_a_difference_counts_where_its_interval_does_not_hold_0(
    scores: tuple[float | None, ...], task: Task, expected: str
) -> None:
    assert against(task, scored("dora", *scores), scored("lora", 90.0, 90.5, 91.0)) == expected


def test_the_table_has_the_budget_first_and_others_apart() -> None:
    rows = [
        scored("vera", 70.0, 71.0, within=False),
        scored("lora", 90.0, 91.0),
        scored("full", 95.0, 96.0, within=None),
    ]
    lines = table(TASK, rows, 100).splitlines()
    starts = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and "accuracy" not in line]
    assert starts == ["lora", "*not at the budget*", "vera", "*for orientation*", "full"]


def test_a_method_whose_runs_all_broke_off_is_shown() -> None:
    text = table(TASK, [scored("lora", 90.0, 91.0), scored("dora", None, None)], 100)
    assert "| dora | - | not known |" in text
    assert "2 of 2 runs broke off" in text


def test_why_a_run_broke_off_is_said() -> None:
    broke = Scored("head", 1e-3, "", (Result(failed="TargetError: it is tied | to another. Name both."),), None)
    assert "1 of 1 runs broke off: TargetError: it is tied / to another |" in table(
        TASK, [scored("lora", 90.0), broke], 1
    )


def test_results_stand_between_the_pages_markers() -> None:
    page = put_between(f"above\n{BEGIN}\nold\n{END}\nbelow\n", "new")
    assert page == f"above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="results: begin"):
        put_between("a page", "new")


def test_the_documents_have_the_markers() -> None:
    page = (REPOSITORY / "docs/methods.md").read_text(encoding="utf-8")
    assert put_between(page, "new") != page


def test_the_picture_is_a_png() -> None:
    assert picture(TASK, [scored("lora", 90.0, 91.0), scored("dora", None, None)]).startswith(b"\x89PNG")


def test_a_record_names_no_place_of_one_machine() -> None:
    task = replace(TASK, model="/some/where/models/tiny", train="/some/where/trec/train.jsonl")
    assert (task.record()["model"], task.record()["train"]) == ("models/tiny", "trec/train.jsonl")


def test_missing_data_is_named(tmp_path: Path) -> None:
    tasks, missing = tasks_of(tmp_path, tmp_path / "model")
    assert tasks == []
    assert all(str(tmp_path) in text for text in itertools.islice(missing, 2))
