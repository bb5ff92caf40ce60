"""Reading what a model's weight files contain without loading a weight.

A safetensors file opens with eight bytes (the header's length, little-endian) and a JSON header that
gives every tensor's dtype, shape and place; the rest is numbers. The places are checked against the
file's size, so that a truncated download is found before anything is built on it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import FormatError, ModelError, bullet_list, quoted

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its name, safetensors' dtype word ('F32', 'BF16'), shape and file name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(folder: str | os.PathLike[str]) -> tuple[TensorInfo, ...]:
    """List the tensors of a model folder (one file or shards with an index), sorted by name.

    Also takes the path of one safetensors file.

    Raises:
        ModelError: no such folder.
        FormatError: no safetensors weights, a pickle, or a broken file; every broken one is named.
    """
    path = Path(folder)
    if path.is_file():
        return tuple(sorted(_file_header(path), key=lambda tensor: tensor.name))
    if not path.is_dir():
        raise ModelError(f"there is no model folder '{path}'.")
    if (path / WEIGHTS).is_file():
        return read_header(path / WEIGHTS)
    if (path / INDEX).is_file():
        return _sharded(path)
    raise FormatError(_no_weights(path))


def _sharded(folder: Path) -> tuple[TensorInfo, ...]:
    index = folder / INDEX
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"'{index}' is not an index of shards: it has no readable 'weight_map'.") from error
    problems: list[str] = []
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        try:
            found.update({tensor.name: tensor for tensor in _file_header(folder / file)})
        except FormatError as error:
            problems.append(str(error))
    if not problems:
        lost = sorted(name for name, file in weight_map.items() if name not in found or found[name].file != file)
        if lost:
            problems.append(f"'{index}' names tensors that their shards do not have: {quoted(lost, 5)}.")
    if problems:
        raise FormatError(bullet_list(problems))
    return tuple(found[name] for name in sorted(weight_map))


def _file_header(file: Path) -> list[TensorInfo]:
    if not file.is_file():
        raise FormatError(f"'{file}' is missing. Copy it from the model's source.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        disguise = _disguise(start)
        if disguise:
            raise FormatError(f"'{file}' is not a safetensors file: {disguise}")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise FormatError(
                f"'{file}' is not a whole safetensors file: its first eight bytes announce a header of "
                f"{length:,} bytes, the file has {size:,}. Copy it again from its source."
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        tensors = [
            (
                TensorInfo(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), file.name),
                entry["data_offsets"],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        problem = _bad_places(tensors, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"'{file}' has a broken safetensors header ({error}). Copy it again from its source."
        ) from error
    if problem:
        raise FormatError(f"'{file}' is broken: {problem} Copy it again from its source.")
    return [tensor for tensor, _ in tensors]


def _bad_places(tensors: list[tuple[TensorInfo, Any]], data_bytes: int) -> str | None:
    """Say what is wrong with the tensors' places in ``data_bytes`` bytes of data, if anything is."""
    end_of_all = 0
    for tensor, (begin, end) in tensors:
        end_of_all = max(end_of_all, end)
        bits = _BITS.get(tensor.dtype)
        if bits is not None and (end - begin) * 8 != tensor.num_elements * bits:
            return f"'{tensor.name}' ({tensor.dtype} {list(tensor.shape)}) is given {end - begin:,} bytes."
    if end_of_all > data_bytes:
        return f"it is cut off: its header announces {end_of_all:,} bytes of data, {data_bytes:,} are there."
    return None


def _disguise(start: bytes) -> str | None:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return f"it is a pickle (made by torch.save). {HOW_TO_CONVERT}"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
    if start.lstrip().startswith((b"<", b"<!")):
        return "it is a web page, probably an error page saved in its place. Download it again."
    return None


HOW_TO_CONVERT = (
    "lorakit reads safetensors only, because a pickle can run code. If you trust its source, convert the "
    "model once in Python: AutoModel.from_pretrained('OLD_FOLDER').save_pretrained('NEW_FOLDER')."
)


def _no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return f"'{folder}' has its weights as a pickle only: {quoted(pickles, 4)}. {HOW_TO_CONVERT}"
    found = f"it has {quoted(names, 6)}" if names else "it is empty"
    return f"'{folder}' has no '{WEIGHTS}' and no '{INDEX}': {found}."
