"""Results as plain values: what an evaluation, a run and a proof found.

Every room writes and reads these; none of them holds a model. ``to_json`` and ``from_json`` are
inverse to each other, so that a run folder keeps exactly what was printed.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class ClassScore:
    """How well one class was found.

    Attributes:
        label: the class's name as it stands in the data.
        precision, recall, f1: in [0, 1]; 0 where the class was never predicted or never present.
        support: rows of this class.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Evaluation:
    """What one pass over held-out rows measured.

    Attributes:
        loss: mean cross-entropy in nats, per row (classification) or per supervised token.
        num_rows: rows evaluated.
        num_tokens: supervised tokens (generation and language modeling), else None.
        perplexity: ``exp(loss)`` for tokens, else None.
        accuracy: share of rows (classification) or of supervised tokens predicted exactly.
        macro_f1: unweighted mean of the classes' F1, classification only.
        classes: one score per label in label order, classification only.
        confusion: ``[num_labels][num_labels]`` counts, row = truth, column = prediction.
    """

    loss: float
    num_rows: int
    num_tokens: int | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    classes: tuple[ClassScore, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One setting of a run, and why it has this value (``reason`` 'as asked' if the user set it)."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One held-out row before and after the training: for classification ``label (probability)``."""

    input: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class BaseOverlap:
    """How an update lies to the singular directions of its base weight (Hu et al. 2021, section 7.3).

    ``U, V`` are the update's own singular directions, ``U_k, V_k`` the base weight's first ones; of each
    there are ``num_directions``. What ends in ``_random`` is the same figure for random directions.

    Attributes:
        num_directions: the update's singular values that are not zero.
        outputs: ``||U_k^T dW||^2 / ||dW||^2``, the share of the update that writes to the base's first directions.
        inputs: ``||dW V_k||^2 / ||dW||^2``, the share that reads from them.
        both: ``||U_k^T dW V_k||^2 / ||dW||^2``.
        projected: ``||U^T W V||``, what the base weight has in the update's directions.
        base_projected: ``||U_k^T W V_k||``, the most that any such directions have.
        amplification: ``||dW|| / ||U^T W V||``; None where the latter is zero.
    """

    num_directions: int
    outputs: float
    inputs: float
    both: float
    outputs_random: float
    inputs_random: float
    both_random: float
    projected: float
    projected_random: float
    base_projected: float
    amplification: float | None
    amplification_random: float | None


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one matrix's update.

    Attributes:
        path: the layer; ``expert`` which matrix of a stack of them, else None.
        singular_values: of the update with its scale and gains, largest first.
        base_norm: Frobenius norm of the base weight; None where it was not read.
        d_out, d_in: of the matrix.
        overlap: see :class:`BaseOverlap`; None where the base weight was not read, or the update is zero.
    """

    path: str
    singular_values: tuple[float, ...]
    base_norm: float | None = None
    expert: int | None = None
    d_out: int | None = None
    d_in: int | None = None
    overlap: BaseOverlap | None = None


@dataclass(frozen=True)
class SimilarityAt:
    """Grassmann similarity of the first ``i`` directions of one adapter and the first ``j`` of another.

    ``||U_i^T U_j||^2 / min(i, j)`` in [0, 1] (Hu et al. 2021, section 7.2, eq. 4).

    Attributes:
        A: for the right singular directions of the factors A; ``B``: for the left ones of B.
        inputs, outputs: for the right and the left ones of the updates ``B A``.
        inputs_random, outputs_random: what random directions have on average, ``max(i, j) / n``.
    """

    i: int
    j: int
    A: float
    B: float
    inputs: float
    outputs: float
    inputs_random: float
    outputs_random: float


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike two adapters' updates of one matrix are, at several numbers of directions; none where one is zero."""

    path: str
    at: tuple[SimilarityAt, ...]
    expert: int | None = None


@dataclass(frozen=True)
class AdapterSimilarity:
    """Two adapters side by side.

    Attributes:
        other: the folder of the other adapter; ``method`` its method's name and settings.
        layers: the layers that both have.
        only_here, only_there: paths that one of them has.
    """

    other: str
    method: dict[str, Any]
    layers: tuple[LayerSimilarity, ...]
    only_here: tuple[str, ...] = ()
    only_there: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterSpectrum:
    """What a look inside the updates of a saved adapter finds.

    Attributes:
        folder: where the adapter is; ``method`` its method's name and settings.
        layers: the spectrum of every update.
        base: the base whose weights were read; None where none was.
        base_missing: why not, and what to do.
        similarity: to another adapter, where one was named.
        notes: remarks for the reader.
    """

    folder: str
    method: dict[str, Any]
    layers: tuple[LayerSpectrum, ...]
    base: str | None = None
    base_missing: str | None = None
    similarity: AdapterSimilarity | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proof:
    """What was checked on the trained model itself.

    Attributes:
        base_unchanged: the digest over every byte of the base before and after are equal.
        digest: that digest (sha256, hexadecimal).
        merged_max_difference: max |merged - unmerged| over held-out outputs, in output units.
        merged_tolerance: the stated bound on it.
        disabled_equals_base: outputs with the adapter disabled equal the untouched model bit for bit.
    """

    base_unchanged: bool
    digest: str
    merged_max_difference: float | None = None
    merged_tolerance: float | None = None
    disabled_equals_base: bool | None = None


@dataclass(frozen=True)
class Planned:
    """What a run was expected to take, before its first step; a line of ``metrics.jsonl`` beside the measured figures.

    Attributes:
        num_steps: optimizer steps.
        num_trainable: numbers to train; None where no step was simulated, as are the next two.
        adapter_bytes: of the tensors that are saved.
        memory: tensor bytes at the highest moment of a step, by what they are for (the base's 'weights' among them).
        left_out: why no step was simulated; empty where one was.
        seconds: of the training without its evaluations; None where it was not estimated.
        seconds_from: where that is from.
    """

    num_steps: int
    num_trainable: int | None = None
    adapter_bytes: int | None = None
    memory: dict[str, int] | None = None
    left_out: str = ""
    seconds: float | None = None
    seconds_from: str = ""

    @property
    def above_weights(self) -> int | None:
        """Bytes of all parts but the loaded base."""
        if self.memory is None:
            return None
        return sum(value for part, value in self.memory.items() if part != "weights")


@dataclass(frozen=True)
class RunSummary:
    """Everything a finished run reports; stored as ``run.json`` in the run folder.

    Attributes:
        task: 'classification', 'generation' or 'language-modeling'.
        model: the base as the user named it; ``revision`` its pinned revision, if any.
        method: the method's name and settings, as JSON.
        identity: short id of the base (see ``lorakit.bases``).
        labels: class names in logit order, classification only.
        before, after: the same held-out rows through the base and through the adapted model.
        majority: always predicting the most frequent training class; ``probe`` a linear probe on the
            frozen base's features. Classification only.
        num_trainable: numbers that were trained; ``num_base`` numbers in the base, all frozen.
        num_head: those of ``num_trainable`` that belong to modules trained in full.
        seconds: wall time of the training loop; ``tokens_per_s`` over its input tokens.
        peak_memory_bytes: tensor bytes above the loaded model at the training's peak; None if not known.
        adapter_bytes: size of the saved adapter file.
        num_train_rows, num_steps, num_epochs: what was trained on, optimizer steps, passes.
        finished: False if the run was interrupted and the adapter is the one so far.
        choices: the settings with their reasons.
        samples: some held-out rows before and after.
        spectra: singular values per adapted layer.
        notes: remarks for the reader (rows skipped, prompts too long, ...).
        proof: what was proven at the end.
    """

    task: str
    model: str
    revision: str | None
    method: dict[str, Any]
    identity: str
    labels: tuple[str, ...]
    before: Evaluation
    after: Evaluation
    majority: Evaluation | None
    probe: Evaluation | None
    num_trainable: int
    num_head: int
    num_base: int
    seconds: float
    tokens_per_s: float
    peak_memory_bytes: int | None
    adapter_bytes: int
    num_train_rows: int
    num_steps: int
    num_epochs: float
    finished: bool = True
    choices: tuple[Choice, ...] = ()
    samples: tuple[Sample, ...] = ()
    spectra: tuple[LayerSpectrum, ...] = ()
    notes: tuple[str, ...] = ()
    proof: Proof | None = None
    version: str = field(default="")


def to_json(record: Any) -> Any:
    """Turn a record (or a list, tuple or dict of them) into plain JSON values."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, (list, tuple)):
        return [to_json(item) for item in record]
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    return record


def from_json(kind: type[R], value: Any) -> R:
    """Build the record ``kind`` from what ``to_json`` made; unknown keys are left out.

    Raises:
        KeyError: a field without a default is missing.
    """
    return typing.cast(R, _read(kind, value))


def _read(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _read(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {}
        for f in dataclasses.fields(kind):
            if f.name in value:
                known[f.name] = _read(hints[f.name], value[f.name])
            elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise KeyError(f.name)
        make: Any = kind
        return make(**known)
    return value
