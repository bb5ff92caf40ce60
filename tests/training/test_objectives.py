"""Losses against transformers' own, scores against counts made by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lorakit.errors import ModelError
from lorakit.text.generate import evaluating
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.objectives import evaluate
from lorakit.training.scores import MOST_ROWS, MOST_TOKENS, bounded_batches, class_scores
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks import Task

Build = Callable[..., nn.Module]
KINDS = ("bert", "gpt2-classifier", "gpt2", "llama", "t5")
# Both sides sum some hundred fp32 terms, in another order.
LOSS_TOLERANCE = 1e-6


def rows_for(kind: str, count: int = 5, seed: int = 1) -> list[EncodedRow]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randrange(3, 34) for _ in range(draw.randint(4, 12))]
        given = draw.randrange(len(ids) - 1)
        labels: list[int] | int = [-100] * given + ids[given:]
        if kind in ("bert", "gpt2-classifier"):
            labels = draw.randrange(3)
        if kind == "t5":
            labels = [draw.randrange(3, 34) for _ in range(draw.randint(2, 6))]
        rows.append(EncodedRow(ids, labels, number, "", ""))
    return rows


def task_of(kind: str) -> Task:
    if kind in ("bert", "gpt2-classifier"):
        return TaskSpec("classification", ("a", "b", "c")).kind
    return TaskSpec("generation", encoder_decoder=kind == "t5").kind


def units(kind: str, rows: list[EncodedRow]) -> int:
    return sum(task_of(kind).units(row) for row in rows)


def collator(kind: str) -> Collator:
    return Collator(0, encoder_decoder=kind == "t5")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_mean_loss_equals_transformers_own(build: Build, kind: str) -> None:
    model, batch = build(kind), collator(kind)(rows_for(kind))
    loss = task_of(kind).loss(model, batch)
    assert float(loss) / units(kind, rows_for(kind)) == pytest.approx(float(model(**batch).loss), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_units_are_the_terms_of_the_summed_loss(build: Build, kind: str) -> None:
    model, batch = build(kind), collator(kind)(rows_for(kind))
    task: Any = task_of(kind)
    assert units(kind, rows_for(kind)) == len(task.predictions(model, batch)[1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_rows_loss_does_not_depend_on_its_neighbours(build: Build, kind: str) -> None:
    model, rows = build(kind), rows_for(kind)
    together = float(task_of(kind).loss(model, collator(kind)(rows)))
    alone = sum(float(task_of(kind).loss(model, collator(kind)([row]))) for row in rows)
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_evaluation_measures_what_one_batch_of_all_rows_does(build: Build, kind: str) -> None:
    model, rows = build(kind), rows_for(kind, count=MOST_ROWS + 9)
    loss, count = task_of(kind).loss(model, collator(kind)(rows)), units(kind, rows)
    found = evaluate(model, rows, collator(kind), ("a", "b", "c") if isinstance(rows[0].labels, int) else ())
    assert found.loss == pytest.approx(float(loss) / count, rel=1e-6)
    assert found.num_rows == len(rows)
    assert found.num_tokens == (None if found.classes else count)


def test_token_accuracy_counts_supervised_tokens_alone(build: Build) -> None:
    model, rows = build("llama"), rows_for("llama")
    batch = collator("llama")(rows)
    logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    hits = [
        int(logits[row, place - 1].argmax()) == int(labels[row, place])
        for row in range(len(rows))
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    found = evaluate(model, rows, collator("llama"))
    assert (found.num_tokens, found.accuracy) == (len(hits), pytest.approx(sum(hits) / len(hits)))
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_one_row_can_be_evaluated(build: Build) -> None:
    row = rows_for("bert", count=1)
    found = evaluate(build("bert"), row, collator("bert"), ("a", "b", "c"))
    assert sum(score.support for score in found.classes) == found.num_rows == 1


def test_an_evaluation_keeps_the_training_mode_of_every_module(build: Build) -> None:
    model: Any = build("bert").train()
    model.classifier.eval()
    before = [module.training for module in model.modules()]
    evaluate(model, rows_for("bert"), collator("bert"), ("a", "b", "c"))
    assert [module.training for module in model.modules()] == before


def test_modules_get_their_mode_back_after_an_error(build: Build) -> None:
    model = build("bert").train()

    def fail() -> None:
        with evaluating(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(module.training for module in model.modules())


def test_scores_follow_from_a_confusion_made_by_hand() -> None:
    # Truth by row: a 3 (2 found, 1 taken for b), b 4 (3 found, 1 taken for a), c 2 (both taken for b).
    found = class_scores([[2, 1, 0], [1, 3, 0], [0, 2, 0]], ("a", "b", "c"), 0.25)
    a, b, c = found.classes

    assert (a.precision, a.recall, a.f1, a.support) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
    assert (b.precision, b.recall, b.f1, b.support) == pytest.approx((3 / 6, 3 / 4, 0.6, 4))
    assert (c.precision, c.recall, c.f1, c.support) == (0.0, 0.0, 0.0, 2)
    assert found.accuracy == pytest.approx(5 / 9)
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.6 + 0.0) / 3)
    assert (found.loss, found.num_rows, found.confusion[1]) == (0.25, 9, (1, 3, 0))


def test_scores_equal_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = random.Random(0)
    truth = [draw.randrange(4) for _ in range(200)]
    predicted = [t if draw.random() < 0.6 else draw.randrange(4) for t in truth]
    found = class_scores(metrics.confusion_matrix(truth, predicted).tolist(), "abcd", 0.0)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(truth, predicted)
    assert [score.precision for score in found.classes] == pytest.approx(list(precision))
    assert [score.recall for score in found.classes] == pytest.approx(list(recall))
    assert [score.f1 for score in found.classes] == pytest.approx(list(f1))
    assert [score.support for score in found.classes] == list(support)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))


@pytest.mark.parametrize(("kind", "labelled"), [("llama", "bert"), ("bert", "llama")])
def test_a_head_for_another_task_is_refused_with_its_shape(build: Build, kind: str, labelled: str) -> None:
    with pytest.raises(ModelError, match=r"gives logits of shape \[5, .*\]; this task needs one score per"):
        task_of(labelled).outputs(build(kind), collator(labelled)(rows_for(labelled)))


def test_a_model_without_a_head_is_refused() -> None:
    body = BertModel(BertConfig(vocab_size=34, hidden_size=16, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ModelError, match="BertModel has no logits"):
        task_of("bert").outputs(body, collator("bert")(rows_for("bert")))


@pytest.mark.parametrize(("length", "rows_at_once"), [(1, MOST_ROWS), (512, MOST_TOKENS // 512), (MOST_TOKENS * 2, 1)])
def test_a_pass_takes_as_many_rows_at_once_as_their_length_allows(length: int, rows_at_once: int) -> None:
    rows = [EncodedRow([3] * length, 0, i, "", "") for i in range(2 * MOST_ROWS)]
    batches = bounded_batches(rows)
    assert {len(batch) for batch in batches} == {rows_at_once}
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
