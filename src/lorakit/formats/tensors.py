"""Tensor files: only safetensors is read, and what is written is the same bytes each time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import FormatError

_LENGTH_BYTES = 8
_ZIP = b"PK\x03\x04"  # what torch.save writes: a pickle in a zip
_PICKLE = b"\x80"  # protocol 2 and later begin so
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file: tensors by key, and the strings of its metadata."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_tensors(path: Path, device: str | torch.device | None = None) -> TensorFile:
    """Read a safetensors file; nothing in it can run code.

    Raises:
        FormatError: the file is a pickle under this name, a pointer, cut off, or otherwise broken.
    """
    problem = _not_safetensors(path)
    if problem is not None:
        raise FormatError(f"'{path}' {problem}")
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            return TensorFile(tensors, opened.metadata() or {})
    except SafetensorError as error:
        raise FormatError(f"'{path}' is not a whole safetensors file ({error}). Copy or save it again.") from error


def write_tensors(path: Path, content: TensorFile) -> None:
    """Write a safetensors file whose bytes follow from the content alone.

    Tensors that share memory are written each in full.
    """
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for key, tensor in content.tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[key] = tensor.detach().clone() if memory in seen else tensor.detach()
        own[key] = own[key].contiguous()
        seen.add(memory)
    save_file(own, path, dict(content.metadata))
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in alphabetical order: safetensors writes it in the order of a random hash."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Both spell the same JSON without spaces, so only the padding can differ.
        assert len(ordered) <= length
        file.seek(_LENGTH_BYTES)
        file.write(ordered.ljust(length))


def _not_safetensors(path: Path) -> str | None:
    """Say what a file is if it is not safetensors, from its first bytes and its size."""
    with path.open("rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    if size == 0:
        return "is empty. Copy or save it again."
    if len(start) > _LENGTH_BYTES and start[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{":
        (length,) = struct.unpack("<Q", start[:_LENGTH_BYTES])
        if length <= size - _LENGTH_BYTES:
            return None
    if start.startswith(_LFS):
        return "is a git-lfs pointer, not the file itself. Run `git lfs pull`."
    if start.startswith(_ZIP) or start.startswith(_PICKLE):
        return "is a pickle under a safetensors name. A pickle can run code when loaded, so it is never opened here."
    return "is not a safetensors file, or is cut off. Copy or save it again."
