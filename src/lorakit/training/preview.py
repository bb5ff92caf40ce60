"""What training will see: the exact tokens of some rows, what is learned of them, and what is odd about the rows.

Only the model's tokenizer and its config are read. Counts are those of training with the same rows, except that of more
than 20,000 rows a sample is counted, which is said.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.bases.source import check_folder, load_config, local_folder, model_kind
from lorakit.bases.tokenizer import NO_LIMIT, load_tokenizer
from lorakit.errors import ModelError
from lorakit.training.config import TrainConfig
from lorakit.training.data.detect import detect_task
from lorakit.training.data.encode import IGNORED, EncodedRow, EncodedSet
from lorakit.training.data.findings import label_counts, warnings_of
from lorakit.training.data.layouts import GENERATION, LANGUAGE_MODELING, MESSAGES, Detection
from lorakit.training.data.pieces import Piece, pieces_of
from lorakit.training.data.read import read_splits, read_table, table_from_rows
from lorakit.training.data.split import split_rows
from lorakit.training.data.table import Table
from lorakit.training.recipe import Recipe, choose_length
from lorakit.training.spec import TaskSpec
from lorakit.training.tasks import find_task
from lorakit.training.vocabulary import extended_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Rows = str | Path | Iterable[Mapping[str, Any]]

MOST_ROWS = 20_000
NUM_BINS = 12
_UNCUT = 2**31 - 1
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class ShownRow:
    """One row in its pieces.

    Attributes:
        number: its line or record.
        pieces: its tokens, in order.
        target: the class, for a classifier; '' where the answer is among the pieces.
        left_out: it is longer than ``max_length`` and not trained on.
        num_cut: tokens that are cut off at the end.
    """

    number: int
    pieces: tuple[Piece, ...]
    target: str
    left_out: bool
    num_cut: int


@dataclass(frozen=True)
class Lengths:
    """How long rows are, in tokens.

    Attributes:
        median, p90, p99, longest: of all counted rows.
        edges: of the bins, one more than there are bins.
        counts: rows in each bin.
        num_over: rows longer than ``max_length``.
    """

    median: int
    p90: int
    p99: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    num_over: int


@dataclass(frozen=True)
class Preview:
    """What training with these rows and this tokenizer will see.

    Attributes:
        model, data: as asked for.
        task, layout: what the rows are.
        found: the same in words, with the columns used and the rows skipped.
        chat: prompts are written as messages, with the model's chat template.
        unit: what rows are numbered by.
        num_rows: rows to train on, and to validate on.
        num_counted: rows that the counts below are of.
        max_length: tokens per row.
        context: the model's.
        num_supervised, num_masked, num_cut: tokens that are learned, read only, cut off or left out with their row.
        lengths: of the counted rows.
        labels: rows of each class in training.
        rows: some rows in their pieces.
        warnings: what is odd.
        notes: what encoding said.
    """

    model: str
    data: str
    task: str
    layout: str
    found: str
    chat: bool
    unit: str
    num_rows: tuple[int, int]
    num_counted: int
    max_length: int
    context: int
    num_supervised: int
    num_masked: int
    num_cut: int
    lengths: Lengths
    labels: dict[str, int]
    rows: tuple[ShownRow, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def preview(
    model: str | Path,
    data: Rows,
    *,
    num_shown: int = 3,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    add_tokens: Sequence[str] | str | None = None,
    max_length: int | None = None,
    validation: float | str = 0.1,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Preview:
    """Read rows as training would, and say what it will see.

    Args:
        model: a folder, or a name on the hub.
        data: a file, a folder, a name on the hub, or rows.
        num_shown: rows to show in their tokens.
        task: as training takes it; so are ``max_length``, ``validation`` and ``seed``.
        columns: as ``detect_task`` takes it.
        add_tokens: as training takes them.
        max_length: tokens per row.
        validation: a share, or a file.
        seed: of the split.
        revision: of a model on the hub.
        trust_remote_code: let code of the model's repository run.

    Raises:
        InputError: what training would refuse, and that nothing is supervised.
    """
    train, held, detection = _read(data, task, columns, validation, seed)
    settings = _settings(max_length=max_length, add_tokens=add_tokens)
    tokenizer, config, context = _load(str(model), revision, trust_remote_code, settings)
    spec = _spec(str(model), config, tokenizer, detection, _labels(train, held, detection), settings, context)
    counted = _sample(train, seed)
    trained, whole = _encoded(spec, counted, detection, tokenizer)
    supervised, read = (sum(map(count, trained.rows)) for count in (_num_learned, _num_read))
    return Preview(
        model=str(model),
        data=train.source,
        task=detection.task,
        layout=detection.layout,
        found=detection.reason,
        chat=spec.chat,
        unit=train.unit,
        num_rows=(len(train.rows), len(held.rows)),
        num_counted=len(counted.rows),
        max_length=spec.max_length,
        context=context,
        num_supervised=supervised,
        num_masked=read if spec.labels or spec.encoder_decoder else read - supervised,
        num_cut=sum(map(_num_read, whole.rows)) - read,
        lengths=_lengths([row.length for row in whole.rows], spec.max_length),
        labels=label_counts(counted, detection) if spec.labels else {},
        rows=_shown_rows(tokenizer, trained.rows, whole.rows, num_shown),
        warnings=warnings_of(counted, held, detection, trained, tokenizer, spec.chat),
        notes=trained.notes,
    )


def _encoded(
    spec: TaskSpec, table: Table, detection: Detection, tokenizer: PreTrainedTokenizerBase
) -> tuple[EncodedSet, EncodedSet]:
    """Encode rows as training does, and without a limit to their length; texts joined in blocks have none."""
    trained = spec.encode(table, detection, tokenizer)
    if detection.task == LANGUAGE_MODELING:
        return trained, trained
    return trained, dataclasses.replace(spec, max_length=_UNCUT).encode(table, detection, tokenizer)


def _labels(train: Table, held: Table, detection: Detection) -> tuple[str, ...]:
    return find_task(detection.task).labels({"train": train, "validation": held}, detection)


def _spec(
    model: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    detection: Detection,
    labels: tuple[str, ...],
    settings: TrainConfig,
    context: int,
) -> TaskSpec:
    """Decide what training would decide, without the model."""
    task, reads, recipe = find_task(detection.task), model_kind(config), Recipe()
    if reads == "encoder" and detection.task in (GENERATION, LANGUAGE_MODELING):
        raise ModelError(f"'{model}' is an encoder: it reads text but does not write it, so it cannot do {task.name}.")
    choose_length(settings, recipe, task.usual, context)
    writes = detection.task == GENERATION
    return TaskSpec(
        detection.task,
        labels,
        recipe.max_length,
        chat=writes and (detection.layout == MESSAGES or bool(tokenizer.chat_template)),
        encoder_decoder=writes and reads == "encoder-decoder",
        separator="",
        layout=detection.layout,
    )


def _read(
    data: Rows, task: str | None, columns: Mapping[str, str] | None, validation: float | str, seed: int
) -> tuple[Table, Table, Detection]:
    tables = read_splits(data) if isinstance(data, (str, Path)) else {"train": table_from_rows(data)}
    train = tables["train"]
    detection = detect_task(train, task, columns)
    held = read_table(validation) if isinstance(validation, str) else tables.get("validation")
    if held is None:
        train, held = split_rows(train, detection, float(validation), seed)
        return train, held, detection
    detect_task(held, detection.task, columns)
    return train, held, detection


def _settings(**asked: Any) -> TrainConfig:
    return TrainConfig(**asked)


def _load(
    model: str, revision: str | None, trust: bool, settings: TrainConfig
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig, int]:
    """Return a model's tokenizer, with the tokens that the settings add, its config, and its context in tokens."""
    folder = local_folder(model)
    if folder is not None:
        check_folder(folder)
    name = str(folder or model)
    tokenizer, config = load_tokenizer(name, revision, trust), load_config(name, revision, trust)
    extended_tokenizer(tokenizer, int(config.get_text_config().vocab_size), settings)
    return tokenizer, config, _context(config, tokenizer)


def _context(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens fit into one input, from the config alone."""
    inner = config.get_text_config()
    stated = [getattr(inner, name, None) for name in _LENGTH_FIELDS]
    limits = [value for value in stated if isinstance(value, int) and 0 < value < NO_LIMIT]
    # RoBERTa and its kin number positions from behind the padding on.
    if limits and any(word in config.model_type for word in ("roberta", "camembert", "xmod")):
        limits.append(min(limits) - int(inner.pad_token_id or 0) - 1)
    if 0 < tokenizer.model_max_length < NO_LIMIT:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=NO_LIMIT)


def _sample(table: Table, seed: int) -> Table:
    if len(table.rows) <= MOST_ROWS:
        return table
    return table.chosen(sorted(random.Random(seed).sample(range(len(table.rows)), MOST_ROWS)))


def _num_learned(row: EncodedRow) -> int:
    return 1 if isinstance(row.labels, int) else sum(label != IGNORED for label in row.labels)


def _spread(count: int, wanted: int) -> list[int]:
    """Return places from the first to the last, evenly apart."""
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


def _num_read(row: EncodedRow) -> int:
    return len(row.input_ids)


def _shown_rows(
    tokenizer: PreTrainedTokenizerBase, trained: Sequence[EncodedRow], whole: Sequence[EncodedRow], wanted: int
) -> tuple[ShownRow, ...]:
    chosen = {_key(row): row for row in (whole[place] for place in _spread(len(whole), wanted))}
    kept = {_key(row): row for row in trained if _key(row) in chosen}
    found = []
    for key, row in chosen.items():
        same = kept.get(key)
        target = row.expected if isinstance(row.labels, int) else ""
        num_cut = len(row.input_ids) - len(same.input_ids) if same is not None else 0
        found.append(ShownRow(row.number, pieces_of(tokenizer, same, row), target, same is None, num_cut))
    return tuple(found)


def _key(row: EncodedRow) -> tuple[object, ...]:
    """Tell the parts of one conversation apart: by how many tokens are read before the first that is learned."""
    return (row.number,) if isinstance(row.labels, int) else (row.number, row.given, len(row.input_ids))


def _lengths(lengths: Sequence[int], max_length: int) -> Lengths:
    ordered = sorted(lengths)
    at: Callable[[float], int] = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    width = max(1, -(-(ordered[-1] + 1 - ordered[0]) // NUM_BINS))
    width = -(-width // 8) * 8 if width > 8 else width
    first = ordered[0] // width * width
    bins = Counter((length - first) // width for length in ordered)
    num_bins = max(bins) + 1
    return Lengths(
        median=at(0.5),
        p90=at(0.9),
        p99=at(0.99),
        longest=ordered[-1],
        edges=tuple(first + i * width for i in range(num_bins + 1)),
        counts=tuple(bins[i] for i in range(num_bins)),
        num_over=sum(length > max_length for length in ordered),
    )
