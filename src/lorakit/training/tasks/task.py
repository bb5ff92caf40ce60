"""``Task``: all that the rest of the training asks of one kind of examples. A new task is one file here.

The loop knows rows, batches, a summed loss and the number of units it is a sum over; it never looks into a batch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lorakit.errors import ConfigError, did_you_mean, quoted
from lorakit.records import Evaluation, Sample
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow, EncodedSet
from lorakit.training.data.layouts import Detection
from lorakit.training.data.table import Table
from lorakit.training.tasks.shortcuts import NONE, Shortcuts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.training.spec import TaskSpec


@dataclass(frozen=True)
class Usual:
    """What the recipe takes where nothing is asked.

    Attributes:
        batch_size: rows per step; ``batch_size_of_many`` where there are 2,000 rows and more.
        fewest_steps: a run has at least so many, unless that takes more than ``most_epochs``.
        epochs: passes over rows that are not few.
        max_length: tokens in a row, at most the model's context.
    """

    batch_size: int
    batch_size_of_many: int
    fewest_steps: int
    epochs: int
    most_epochs: int
    max_length: int


class Task(ABC):
    """One kind of examples, as a run has learned to see them.

    Attributes:
        name: how configs, the command line and ``task.json`` call it.
        usual: the recipe's numbers.
        spec: labels, lengths and wording of this run.
    """

    name: ClassVar[str]
    usual: ClassVar[Usual]

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec

    # Rows -----------------------------------------------------------------------------------------

    @classmethod
    def labels(cls, tables: Mapping[str, Table], detection: Detection) -> tuple[str, ...]:
        """Return the names of the classes, for tasks that have some."""
        return ()

    @classmethod
    @abstractmethod
    def check_model(cls, model: nn.Module, labels: Sequence[str]) -> None:
        """Refuse a model object that cannot do this task.

        Raises:
            InputError: it lacks what the task needs.
        """

    @classmethod
    @abstractmethod
    def fitted(cls, spec: TaskSpec, model: Any, tokenizer: PreTrainedTokenizerBase) -> TaskSpec:
        """Return the spec with what only model and rows together say."""

    @abstractmethod
    def encode(self, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Turn rows into tokens and labels."""

    def encoded(self, found: EncodedSet) -> TaskSpec:
        """Return the spec with what the encoded training rows have shown."""
        return self.spec

    def collator(self, pad_token_id: int) -> Collator:
        """Return what makes batches of encoded rows."""
        return Collator(pad_token_id, encoder_decoder=self.spec.encoder_decoder, max_length=self.spec.max_length)

    def size(self, row: EncodedRow) -> int:
        """Return a row's input tokens: rows of like size share a batch."""
        return len(row.input_ids)

    # Learning -------------------------------------------------------------------------------------

    @abstractmethod
    def units(self, row: EncodedRow) -> int:
        """Return how many terms the row adds to the summed loss: each weighs the same in a step."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the model's outputs on a batch, by which merged and unmerged models are compared.

        Raises:
            ModelError: the model has no head, or one for another task.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor], shortcuts: Shortcuts = NONE) -> Tensor:
        """Return the loss in nats, summed over the batch's units in fp32."""

    def possible_shortcuts(self, model: nn.Module) -> Shortcuts:
        """Return what a model of this kind may be able to leave out in :meth:`loss`, judged without its values."""
        return NONE

    def shortcuts(self, model: nn.Module, collate: Collator, rows: Sequence[EncodedRow]) -> Shortcuts:
        """Return what this model can leave out in :meth:`loss`, tried on the beginnings of ``rows``."""
        return NONE

    # Measuring ------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Sequence[EncodedRow], collate: Collator) -> Evaluation:
        """Measure a model on rows; every module's mode is as it was afterwards."""

    def goodness(self, found: Evaluation) -> tuple[float, ...]:
        """Return what two measurements are compared by; more is better."""
        return (-found.loss,)

    def baselines(
        self, model: nn.Module, train: Sequence[EncodedRow], held: Sequence[EncodedRow], collate: Collator
    ) -> dict[str, Evaluation | None]:
        """Measure what the run must beat, by the fields of :class:`RunSummary`; ``model`` is the frozen base."""
        return {}

    @abstractmethod
    def questions(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
        """Choose the held-out rows that are answered before and after."""

    def followed(self, asked: Sequence[EncodedRow]) -> Sequence[int]:
        """Return which of the questions, by their place, are answered at each evaluation too: few, and the same."""
        return range(min(3, len(asked)))

    @abstractmethod
    def answer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow]
    ) -> list[str]:
        """Answer questions with the model as it is now."""

    def paired(self, before: Sequence[str], after: Sequence[str], rows: Sequence[EncodedRow]) -> tuple[Sample, ...]:
        """Put answers to the same questions from before and after side by side."""
        found = zip(rows, before, after, strict=True)
        return tuple(Sample(row.prompt, row.expected, first, second) for row, first, second in found)

    # Formats --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def peft(self) -> str:
        """PEFT's word for the task."""

    def with_spec(self, **changes: Any) -> TaskSpec:
        """Return the spec with some fields changed."""
        return replace(self.spec, **changes)


@functools.cache
def _registry() -> dict[str, type[Task]]:
    import lorakit.training.tasks as package

    found: dict[str, type[Task]] = {}
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, Task) and not inspect.isabstract(kind):
                found[kind.name] = kind
    return found


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_registry())


def find_task(name: str) -> type[Task]:
    """Return a task by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _registry():
        raise ConfigError(f"unknown task '{name}'.{did_you_mean(name, task_names())} Tasks: {quoted(task_names())}.")
    return _registry()[name]
