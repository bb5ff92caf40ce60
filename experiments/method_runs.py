"""The real tasks, the methods that are compared on them, and one run of one of them.

    python experiments/method_runs.py RUN.json RESULT.json

runs what RUN.json says in a process of its own, so that one run's memory is not another's.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.budgets import Matched, match  # noqa: E402  # the path comes first

ADAPTER = "default"
REFERENCE_RANK = 8
TARGETS = "all-linear"


@dataclass(frozen=True)
class Task:
    """One real task, capped.

    Attributes:
        name: 'trec' or 'e2e'.
        title: task and model in words.
        model, train, test: the model's folder, and files of rows.
        num_rows, num_held, num_test: rows to train on, to choose the rate by, and to measure on.
        steps, batch_size: of each run.
        score: 'accuracy' (in percent, higher is better) or 'perplexity' (lower is better).
    """

    name: str
    title: str
    model: str
    train: str
    test: str
    num_rows: int
    num_held: int
    num_test: int
    steps: int
    batch_size: int
    score: str

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one."""
        return self.score == "accuracy"

    def record(self) -> dict[str, Any]:
        """Return the fields as they are kept: files by their folder and name, wherever those lie."""
        files = {name: "/".join(Path(getattr(self, name)).parts[-2:]) for name in ("model", "train", "test")}
        return {**asdict(self), **files}


@dataclass(frozen=True)
class Candidate:
    """What is compared.

    Attributes:
        name: as the tables call it.
        fields: the method's name and fields, without ranks.
        rate_factor: what the grid of learning rates is multiplied by.
        most_rank: no higher rank is tried for the budget.
        anchor: it is not at the budget, but beside it for orientation.
        keeps_budget: it takes the budget itself, and no more than it.
        remark: what a reader must know of its column.
    """

    name: str
    fields: Mapping[str, Any]
    rate_factor: float = 1.0
    most_rank: int = 64
    anchor: bool = False
    keeps_budget: bool = False
    remark: str = ""


_VERA = "cannot reach the budget: d_out + rank numbers a layer, at the rank of 256 that it is meant for"
_METHODS = (
    Candidate("lora", {"name": "lora"}),
    Candidate("rslora", {"name": "lora", "scaling": "rslora"}),
    Candidate("loraplus", {"name": "loraplus"}),
    Candidate("lorafa", {"name": "lorafa"}),
    Candidate("lorapro", {"name": "lorapro"}),
    Candidate("dora", {"name": "dora"}),
    Candidate("vera", {"name": "vera"}, most_rank=256, remark=_VERA),
    Candidate("adalora", {"name": "adalora", "rank": REFERENCE_RANK}, keeps_budget=True),
    Candidate("increlora", {"name": "increlora", "rank": REFERENCE_RANK}, keeps_budget=True),
    Candidate("dylora", {"name": "dylora"}),
    Candidate("lora rank=auto", {"name": "lora", "rank": "auto"}, keeps_budget=True),
)
_ANCHORS = (
    Candidate("full", {"name": "full"}, 0.1, anchor=True, remark="all numbers; a tenth of the rates"),
    Candidate("head", {"name": "head"}, anchor=True, remark="the head alone"),
)


def candidates() -> tuple[list[Candidate], list[str]]:
    """Return what this lorakit can be compared in, and the names of those it does not have.

    Methods and inits that are registered and stand in no list here come as they are.
    """
    from lorakit.inits.init import init_names
    from lorakit.methods import method_names

    registered = set(method_names())
    have = [candidate for candidate in _METHODS if candidate.fields["name"] in registered]
    missing = [candidate.name for candidate in _METHODS if candidate.fields["name"] not in registered]
    listed = {candidate.fields["name"] for candidate in (*_METHODS, *_ANCHORS)}
    have += [Candidate(name, {"name": name}) for name in sorted(registered - listed)]
    inits = [name for name in init_names() if name not in ("kaiming", "blank", "blank-shifted")]
    have += [Candidate(f"lora init={name}", {"name": "lora", "init": name}) for name in inits]
    wanted = {"gaussian", "orthogonal", "pissa", "olora", "milora", "eva", "corda", "loraga", "loraone"}
    missing += [f"lora init={name}" for name in sorted(wanted - set(inits))]
    return [*have, *_ANCHORS], missing


def with_ranks(candidate: Candidate, matched: Matched) -> dict[str, Any]:
    """Return a candidate's fields at the ranks found, at LoRA's usual ``alpha = 2 rank`` where it has an alpha."""
    from lorakit.methods import find_method

    known = find_method(dict(candidate.fields)).summary()
    fields = {**candidate.fields, "rank": matched.rank}
    if "alpha" in known:
        fields["alpha"] = 2.0 * matched.rank
    if matched.higher:
        fields["rank_pattern"] = {re.escape(path): matched.rank + 1 for path in matched.higher}
        fields["alpha_pattern"] = {re.escape(path): 2.0 * (matched.rank + 1) for path in matched.higher}
    return fields


def rows_of(task: Task) -> list[dict[str, Any]]:
    """Return the rows to train on and to validate on, the same in every run."""
    return _sample(Path(task.train), task.num_rows + task.num_held)


def _sample(file: Path, count: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return random.Random(0).sample(rows, min(count, len(rows)))


def _settings(task: Task) -> dict[str, Any]:
    return {
        "batch_size": task.batch_size,
        "max_steps": task.steps,
        "validation": task.num_held / (task.num_rows + task.num_held),
        "targets": TARGETS,
        "dtype": "fp32",
    }


def budgets(task: Task, wanted: Sequence[Candidate]) -> tuple[int, dict[str, tuple[dict[str, Any], Matched | None]]]:
    """Return the budget, LoRA's numbers at the reference rank, and each candidate's fields at it."""
    import lorakit as lk
    from lorakit.methods import find_method
    from lorakit.training.config import TrainConfig
    from lorakit.training.observe import Observer
    from lorakit.training.prepare import prepare

    base = prepare(task.model, rows_of(task), TrainConfig(**_settings(task)), None, Observer()).base
    heads = list(base.new_modules)

    def numbers(fields: Mapping[str, Any]) -> dict[str, int]:
        handle = lk.attach(base.model, fields, TARGETS, train_modules=heads, new_modules=heads, blank=True)
        found = {path: sum(p.numel() for p in update.parameters()) for path, update in handle.updates().items()}
        handle.detach()
        return found

    reference = numbers({"name": "lora", "rank": REFERENCE_RANK})
    budget, known = sum(reference.values()), {}
    for candidate in wanted:
        if candidate.anchor:
            known[candidate.name] = dict(candidate.fields), None
        elif candidate.keeps_budget:
            fields = {**candidate.fields, "budget": budget, "alpha": 2.0 * REFERENCE_RANK}
            known[candidate.name] = fields, Matched(REFERENCE_RANK, budget, True)
        else:
            mixes = "rank_pattern" in find_method(dict(candidate.fields)).summary()
            fields = dict(candidate.fields)
            found = match(lambda rank, f=fields: numbers({**f, "rank": rank}), budget, candidate.most_rank, mixes)
            known[candidate.name] = with_ranks(candidate, found), found
    return budget, known


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        held, test: the score on the rows that the rate is chosen by, and on the test rows; None where it broke off.
        numbers: trained numbers at the end, without modules trained in full; ``head`` those in them.
        seconds: of the training loop; ``peak_bytes`` tensor bytes above the loaded model at the peak.
        file_bytes: of the saved adapter with its head.
        failed: why the run broke off, in the words of its error.
        version: lorakit's.
    """

    held: float | None = None
    test: float | None = None
    numbers: int = 0
    head: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    file_bytes: int = 0
    failed: str = ""
    version: str = ""
    spec: Mapping[str, Any] = field(default_factory=dict)


def score_of(task: Task, evaluation: Any) -> float:
    """Return an evaluation's score."""
    found = evaluation.accuracy if task.score == "accuracy" else evaluation.perplexity
    return float(found) * (100.0 if task.score == "accuracy" else 1.0)


def run(task: Task, fields: Mapping[str, Any], lr: float, seed: int) -> Result:
    """Train once as ``lorakit.fit`` does, without its baselines, estimates and report, and measure."""
    import lorakit as lk
    from lorakit.errors import LorakitError
    from lorakit.training.config import TrainConfig
    from lorakit.training.data.read import read_table
    from lorakit.training.data.table import Table
    from lorakit.training.loop import train
    from lorakit.training.measuring import step_memory
    from lorakit.training.observe import Observer
    from lorakit.training.outset import attached
    from lorakit.training.prepare import prepare
    from lorakit.training.recipe import plan_of

    config = TrainConfig(**_settings(task), method=dict(fields), lr=lr, seed=seed)
    prepared = prepare(task.model, rows_of(task), config, None, Observer())
    spec, tokenizer, model = prepared.spec, prepared.base.tokenizer, prepared.base.model
    kind, collate = spec.kind, spec.collator(tokenizer)
    try:
        handle = attached(prepared, config, ADAPTER)
        peak = step_memory(prepared, handle, ADAPTER, prepared.recipe.micro_batch, False)
        began = time.perf_counter()
        train(handle, ADAPTER, kind, prepared.train, collate, plan_of(config, prepared.recipe), Observer())
        seconds = time.perf_counter() - began
    except LorakitError as error:
        return Result(failed=f"{type(error).__name__}: {error}")
    table = read_table(Path(task.test))
    rows = random.Random(0).sample(list(table.rows), min(task.num_test, len(table.rows)))
    encoded = spec.read(Table(table.source, tuple(rows), table.unit), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        files = lk.save(handle, folder)
        size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    counts = handle.counts(ADAPTER)
    return Result(
        held=score_of(task, kind.evaluate(model, prepared.held, collate)),
        test=score_of(task, kind.evaluate(model, encoded.rows, collate)),
        numbers=counts.updates,
        head=counts.full,
        seconds=seconds,
        peak_bytes=peak,
        file_bytes=size,
        version=lk.__version__,
    )


def main() -> int:
    """Run what a file says and write the result beside it."""
    from lorakit.files import write_json

    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    task = Task(**given["task"])
    found = run(task, given["fields"], given["lr"], given["seed"])
    write_json(sys.argv[2], {**asdict(found), "spec": {**given, "task": task.record()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
