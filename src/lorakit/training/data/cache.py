"""Encoded rows on disk: tokenised once, found again by what they were made of, read row by row.

An entry is two files, ``KEY.arrow`` (the rows, in Arrow's file format, memory-mapped) and ``KEY.json`` (their count, a
checksum, the notes). KEY is a hash of the rows' content, the tokenizer's content, the settings and ``ENCODING``. The
second file is written last, so that an entry is whole or is none; one whose checksum is wrong is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lorakit.files import atomic_write, write_json
from lorakit.training.data.encoded import EncodedRow, EncodedRows
from lorakit.training.data.table import Table

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

ENCODING = 1
"""Raised with every change to what rows are encoded as."""

LEAST_ROWS = 10_000
MOST_BYTES = 50 * 2**30
BATCH = 1024

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Return where encoded rows are kept: LORAKIT_CACHE, else in the user's cache folder; None if it is 'off'."""
    named = os.environ.get("LORAKIT_CACHE")
    if named is not None and named.strip().lower() in ("", "0", "off", "none", "no"):
        return None
    if named is not None:
        return Path(named).expanduser() / "rows"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lorakit" / "rows"


def content_key(table: Table, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    """Return the hash of all that decides how rows are encoded; reads every row once.

    Args:
        table: the rows.
        tokenizer: a fast tokenizer.
        settings: all else, as JSON values.
    """
    import tokenizers
    import transformers

    key = hashlib.blake2b(digest_size=20)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = [ENCODING, transformers.__version__, tokenizers.__version__]
    told = [versions, type(tokenizer).__name__, special, str(tokenizer.chat_template), dict(settings), table.unit]
    key.update(json.dumps(told, sort_keys=True).encode())
    key.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in table.rows:
        # 'surrogatepass': half a pair is refused when it is encoded, by name, and not here.
        content = json.dumps(row.fields, ensure_ascii=False, default=str)
        key.update(f"{row.number}\x1f{content}\x1e".encode("utf-8", "surrogatepass"))
    return key.hexdigest()


@dataclass(frozen=True)
class Entry:
    """One set of encoded rows in the cache folder."""

    folder: Path
    key: str

    @property
    def rows_file(self) -> Path:
        """The rows."""
        return self.folder / f"{self.key}.arrow"

    @property
    def facts_file(self) -> Path:
        """What is known of them."""
        return self.folder / f"{self.key}.json"

    def read(self) -> tuple[EncodedRows, dict[str, Any]] | None:
        """Return rows and facts; None if there are none, or they are broken (which is logged)."""
        try:
            facts = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            facts = {}
        checksum = _checksum(self.rows_file)
        if not isinstance(facts, dict) or checksum is None or facts.get("checksum") != checksum:
            _log.warning("the cached rows '%s' are broken and are made again.", self.rows_file)
            return None
        os.utime(self.facts_file)
        return MappedRows(self.rows_file), facts

    def write(self, rows: Iterable[EncodedRow], facts: Callable[[], Mapping[str, Any]]) -> EncodedRows:
        """Write rows as they come, a batch at a time, and return them as read from the file.

        ``facts`` is asked after the last row has come.

        Raises:
            OSError, TrainingError: the files cannot be written.
        """
        import pyarrow

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(self.rows_file) as temporary,
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_file(sink, _schema()) as writer,
        ):
            for batch in _batches(rows):
                writer.write_batch(batch)
        write_json(self.facts_file, {**facts(), "checksum": _checksum(self.rows_file)})
        _trim(self.folder, keep=self.key)
        return MappedRows(self.rows_file)


class MappedRows(EncodedRows):
    """Encoded rows of an Arrow file, read when they are asked for."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        self._batches = [_Columns(reader.get_batch(index)) for index in range(reader.num_record_batches)]
        self._count: int = sum(batch.count for batch in self._batches)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[EncodedRow]: ...
    def __getitem__(self, place: int | slice) -> EncodedRow | Sequence[EncodedRow]:
        places = range(self._count)[place]
        if isinstance(places, int):
            return self._batches[places // BATCH].row(places % BATCH)
        return tuple(self._batches[i // BATCH].row(i % BATCH) for i in places)

    def lengths(self) -> list[int]:
        """Return the number of input tokens of each row, without reading the tokens."""
        return [length for batch in self._batches for length in batch.lengths()]


class _Columns:
    """The columns of one batch as arrays over the mapped file."""

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        self.count: int = batch.num_rows
        lists = {name: batch.column(name) for name in ("input_ids", "labels", "types")}
        self._values = {name: column.values.to_numpy() for name, column in lists.items()}
        self._offsets = {name: column.offsets.to_numpy() for name, column in lists.items()}
        self._classes = batch.column("class").to_numpy()
        self._numbers = batch.column("number").to_numpy()
        self._texts = batch.select(["prompt", "expected"])

    def lengths(self) -> list[int]:
        offsets = self._offsets["input_ids"]
        lengths: list[int] = (offsets[1:] - offsets[:-1]).tolist()
        return lengths

    def row(self, place: int) -> EncodedRow:
        labels, types = self._list("labels", place), self._list("types", place)
        number = int(self._classes[place])
        return EncodedRow(
            self._list("input_ids", place),
            labels if number < 0 else number,
            int(self._numbers[place]),
            self._texts["prompt"][place].as_py(),
            self._texts["expected"][place].as_py(),
            types or None,
        )

    def _list(self, name: str, place: int) -> list[int]:
        offsets = self._offsets[name]
        values: list[int] = self._values[name][offsets[place] : offsets[place + 1]].tolist()
        return values


def _schema() -> pyarrow.Schema:
    import pyarrow

    numbers = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        [
            ("input_ids", numbers),
            ("labels", numbers),
            ("class", pyarrow.int64()),  # -1 where labels are one per token
            ("types", pyarrow.list_(pyarrow.int8())),
            ("number", pyarrow.int64()),
            ("prompt", pyarrow.large_string()),
            ("expected", pyarrow.large_string()),
        ]
    )


def _batches(rows: Iterable[EncodedRow]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    def batch(waiting: Sequence[EncodedRow]) -> pyarrow.RecordBatch:
        columns = [
            [row.input_ids for row in waiting],
            [row.labels if isinstance(row.labels, list) else [] for row in waiting],
            [-1 if isinstance(row.labels, list) else row.labels for row in waiting],
            [row.token_type_ids or [] for row in waiting],
            [row.number for row in waiting],
            [row.prompt for row in waiting],
            [row.expected for row in waiting],
        ]
        kinds = _schema()
        arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, kinds, strict=True)]
        return pyarrow.record_batch(arrays, schema=kinds)

    waiting: list[EncodedRow] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == BATCH:
            yield batch(waiting)
            waiting = []
    if waiting:
        yield batch(waiting)


def _checksum(file: Path) -> int | None:
    """Return the CRC-32 of a file; None if it cannot be read."""
    total = 0
    try:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                total = zlib.crc32(block, total)
    except OSError:
        return None
    return total


def _trim(folder: Path, keep: str) -> None:
    """Remove the entries that were not used for longest while all together are too large."""
    entries = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for facts in entries:
        rows = facts.with_suffix(".arrow")
        total += rows.stat().st_size if rows.is_file() else 0
        if total > MOST_BYTES and facts.stem != keep and time.time() - facts.stat().st_mtime > 3600:
            facts.unlink(missing_ok=True)
            rows.unlink(missing_ok=True)
