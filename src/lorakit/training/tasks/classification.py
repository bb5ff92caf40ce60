"""Classification: one class per text, or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.records import Evaluation, Sample
from lorakit.training import baselines
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow, EncodedSet, encode_classification
from lorakit.training.data.layouts import CLASSIFICATION, Detection
from lorakit.training.data.split import label_names
from lorakit.training.data.table import Table
from lorakit.training.scores import class_scores, confusion_of, probabilities
from lorakit.training.tasks.labelled import Labelled, logits_of
from lorakit.training.tasks.shortcuts import NONE, Shortcuts
from lorakit.training.tasks.task import Usual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.training.spec import TaskSpec

NUM_SHOWN = 6


class Classification(Labelled):
    """Texts and their classes; a unit is a row."""

    name: ClassVar[str] = CLASSIFICATION
    usual: ClassVar[Usual] = Usual(
        batch_size=16, batch_size_of_many=32, fewest_steps=250, epochs=5, most_epochs=15, max_length=512
    )
    peft = "SEQ_CLS"

    @classmethod
    def labels(cls, tables: Mapping[str, Table], detection: Detection) -> tuple[str, ...]:
        """Return the classes of the training rows, sorted."""
        return label_names(tables, detection)

    @classmethod
    def check_model(cls, model: nn.Module, labels: Sequence[str]) -> None:
        """Refuse a head with another number of classes."""
        config: Any = model.config
        if config.num_labels != len(labels):
            raise ConfigError(
                f"the model has {config.num_labels} classes, the rows {len(labels)}: {', '.join(labels)}. "
                "Load it with num_labels to match, or give its name instead."
            )

    @classmethod
    def fitted(cls, spec: TaskSpec, model: Any, tokenizer: PreTrainedTokenizerBase) -> TaskSpec:
        """Return the spec as it is: everything is in the rows."""
        return spec

    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn texts into tokens, cut at the end, and labels into numbers."""
        return encode_classification(table, detection, tokenizer, self.spec.labels, self.spec.max_length)

    def units(self, row: EncodedRow) -> int:
        """Return 1."""
        return 1

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return logits ``[B, classes]``."""
        return logits_of(model, batch, 2, "one score per class")

    def predictions(
        self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE
    ) -> tuple[Tensor, Tensor]:
        """Return each row's logits and its class."""
        return self.outputs(model, batch), batch["labels"]

    def scored(self, loss: float, num_rows: int, truth: Tensor, predicted: Tensor) -> Evaluation:
        """Return accuracy, macro-F1, every class's scores and the confusion matrix."""
        return class_scores(confusion_of(truth, predicted, len(self.spec.labels)), self.spec.labels, loss)

    def goodness(self, found: Evaluation) -> tuple[float, ...]:
        """Compare by accuracy, and by loss where it is the same."""
        return (found.accuracy or 0.0, -found.loss)

    def baselines(
        self, model: nn.Module, train: Sequence[EncodedRow], held: Sequence[EncodedRow], collate: Collator
    ) -> dict[str, Evaluation | None]:
        """Measure the majority class, and a linear probe on the frozen base."""
        return {
            "majority": baselines.majority(train, held, self.spec.labels),
            "probe": baselines.linear_probe(model, train, held, collate, self.spec.labels),
        }

    def questions(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
        """Choose all rows: predictions cost little."""
        return tuple(rows)

    def followed(self, asked: Sequence[EncodedRow]) -> Sequence[int]:
        """Return the first row of each class, six at most."""
        firsts: dict[str, int] = {}
        for place, row in enumerate(asked):
            firsts.setdefault(row.expected, place)
        return sorted(firsts.values())[:NUM_SHOWN]

    def answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]
    ) -> list[str]:
        """Return ``label (probability)`` for each row."""
        if not rows:
            return []
        best = probabilities(model, rows, self.spec.collator(tokenizer)).max(-1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [f"{self.spec.labels[place]} ({share:.2f})" for share, place in pairs]

    def paired(self, before: Sequence[str], after: Sequence[str], rows: Sequence[EncodedRow]) -> tuple[Sample, ...]:
        """Show one row of each class, which turned right if there is one, and one that is wrong still."""
        found = list(super().paired(before, after, rows))
        turned = sorted(found, key=lambda s: not (_right(s.after, s) and not _right(s.before, s)))
        firsts: dict[str, Sample] = {}
        for sample in turned:
            firsts.setdefault(sample.expected, sample)
        shown = [*firsts.values(), *(sample for sample in turned if sample not in firsts.values())]
        wrong = [
            sample for sample in found if not _right(sample.after, sample) and sample not in shown[: NUM_SHOWN - 1]
        ]
        return tuple([*shown[: NUM_SHOWN - len(wrong[:1])], *wrong[:1]])


def _right(answered: str, sample: Sample) -> bool:
    return answered.rpartition(" (")[0] == sample.expected
