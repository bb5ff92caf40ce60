"""What a classifier must beat: the majority class by hand, the linear probe against scikit-learn's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from lorakit.training import baselines
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow

LABELS = ("a", "b", "c")


class Table(nn.Module):
    """A frozen base whose hidden state of a token is that token's row of a table."""

    def __init__(self, width: int = 6, shown: bool = True) -> None:
        super().__init__()
        self.states = nn.Embedding(34, width)
        self.shown = shown

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False
    ) -> SequenceClassifierOutput:
        states = (self.states(input_ids),) if self.shown else None
        return SequenceClassifierOutput(logits=torch.zeros(len(input_ids), 3), hidden_states=states)


def rows_of(classes: list[int], seed: int = 0) -> list[EncodedRow]:
    """Return rows of tokens of which those of a class are likelier in its rows."""
    draw = random.Random(seed)
    return [
        EncodedRow([draw.randrange(3 + 4 * label, 20) for _ in range(draw.randint(2, 9))], label, i, "", LABELS[label])
        for i, label in enumerate(classes)
    ]


def test_the_majority_is_the_most_frequent_class_of_the_training_rows() -> None:
    found = baselines.majority(rows_of([0, 1, 1, 1, 2]), rows_of([0, 0, 1, 2]), LABELS)
    assert found.confusion == ((0, 2, 0), (0, 1, 0), (0, 1, 0))
    assert found.accuracy == 0.25
    # Shares with one row added to each class: 2/8, 4/8, 2/8.
    assert found.loss == pytest.approx(-(3 * math.log(2 / 8) + math.log(4 / 8)) / 4)


def test_features_are_the_mean_state_of_a_rows_own_tokens_in_the_rows_order() -> None:
    model, rows = Table(), rows_of([0, 1, 2, 1, 0] * 9)
    found = baselines.features(model, rows, Collator(0))
    expected = torch.stack([model.states.weight[row.input_ids].mean(0) for row in rows])
    assert found is not None
    torch.testing.assert_close(found, expected.detach())


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    model = Table()
    train, held = rows_of([0, 1, 2] * 30), rows_of([0, 1, 2] * 10, seed=1)
    found = baselines.linear_probe(model, train, held, Collator(0), LABELS)
    x, held_x = baselines.features(model, train, Collator(0)), baselines.features(model, held, Collator(0))
    assert x is not None
    assert held_x is not None
    assert found is not None
    mean, deviation = x.mean(0), x.std(0)
    # Its C weighs the summed loss against half the squared weights: the same objective at C = 1.
    peer = linear_model.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    peer.fit(((x - mean) / deviation).double().numpy(), [row.labels for row in train])
    logits = torch.from_numpy(peer.decision_function(((held_x - mean) / deviation).double().numpy()))
    truth = torch.tensor([row.labels for row in held])

    assert found.loss == pytest.approx(float(F.cross_entropy(logits, truth)), abs=1e-3)
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == truth).double().mean()), abs=1 / len(held))


def test_the_probe_finds_classes_that_a_line_parts() -> None:
    rows = [EncodedRow([3 + label] * 4, label, i, "", LABELS[label]) for i, label in enumerate([0, 1, 2] * 8)]
    found = baselines.linear_probe(Table(), rows, rows[:6], Collator(0), LABELS)
    assert found is not None
    assert found.accuracy == 1.0


def test_the_probe_of_many_rows_in_the_order_of_their_classes_sees_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "PROBE_ROWS", 12)
    rows = [EncodedRow([3 + label] * 4, label, i, "", LABELS[label]) for label in range(3) for i in range(20)]
    found = baselines.linear_probe(Table(), rows, rows[::10], Collator(0), LABELS)
    assert found is not None
    assert found.accuracy == 1.0


def test_the_probe_trains_nothing_in_the_base() -> None:
    model = Table()
    before = model.states.weight.detach().clone()
    baselines.linear_probe(model, rows_of([0, 1, 2] * 4), rows_of([0, 1, 2]), Collator(0), LABELS)
    assert torch.equal(model.states.weight, before)
    assert model.states.weight.grad is None


def test_there_is_no_probe_of_a_model_that_shows_no_hidden_states() -> None:
    rows = rows_of([0, 1, 2])
    assert baselines.linear_probe(Table(shown=False), rows, rows, Collator(0), LABELS) is None


@pytest.mark.parametrize("kind", ["bert", "gpt2-classifier"])
def test_real_classifiers_show_their_states(build: Callable[[str], Any], kind: str) -> None:
    found = baselines.features(build(kind), rows_of([0, 1, 2, 2]), Collator(0))
    assert found is not None
    assert found.shape == (4, 32)
