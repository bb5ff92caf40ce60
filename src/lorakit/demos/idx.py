"""Reading idx files, the format in which MNIST is handed out (LeCun, Cortes & Burges).

    bytes 0-1   zero
    byte 2      type of the entries; 0x08 is unsigned bytes, the only one that MNIST has
    byte 3      number of dimensions
    then        each dimension as a big-endian 32-bit number, then the entries, last dimension fastest

A file may be gzipped; its first bytes say so, whatever it is called.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import DataError

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTES = 8
_CHUNK_BYTES = 1 << 20


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read an idx file of unsigned bytes.

    Args:
        path: the file, gzipped or not.
        num_dims: how many dimensions it must have: 3 for images, 1 for labels.

    Returns:
        A ``uint8`` tensor of the file's shape.

    Raises:
        DataError: it cannot be read, is not gzip though its name says so, has another magic number, ends
            early or goes on after its last entry.
    """
    try:
        with path.open("rb") as raw:
            start = raw.read(len(_GZIP))
            raw.seek(0)
            if start == _GZIP:
                with gzip.open(raw) as unpacked:
                    return _read(path, unpacked, num_dims)
            if path.suffix == ".gz":
                raise DataError(
                    f"'{path}' is not gzip, though its name ends in .gz: it begins with {_shown(start)} instead of "
                    f"{_shown(_GZIP)}. Download it again; if it is unpacked already, take .gz off its name."
                )
            return _read(path, raw, num_dims)
    except EOFError:
        raise DataError(f"'{path}' is cut off: its gzip stream has no end. Download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"'{path}' is broken gzip ({error}). Download it again.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None


def _read(path: Path, stream: io.BufferedIOBase, num_dims: int) -> Tensor:
    expected = bytes((0, 0, _UNSIGNED_BYTES, num_dims))
    magic = stream.read(len(expected))
    if magic != expected:
        raise DataError(
            f"'{path}' has the magic number {_shown(magic)}; an idx file of unsigned bytes in "
            f"{num_dims} dimension{'s' if num_dims > 1 else ''} has {_shown(expected)}. "
            f"{_what_it_is(magic)}Give the file as MNIST's publishers made it."
        )
    sizes = stream.read(4 * num_dims)
    if len(sizes) < 4 * num_dims:
        raise DataError(f"'{path}' is cut off: it ends within its header. Download it again.")
    shape = struct.unpack(f">{num_dims}I", sizes)
    num_entries = math.prod(shape)
    entries = _up_to(stream, num_entries + 1)
    if len(entries) != num_entries:
        found = f"holds only {len(entries):,}" if len(entries) < num_entries else "goes on after them"
        of_what = "is cut off" if len(entries) < num_entries else "is too long"
        sizes_said = f"{' x '.join(f'{n:,}' for n in shape)} = " if num_dims > 1 else ""
        raise DataError(
            f"'{path}' {of_what}: its header announces {sizes_said}{num_entries:,} bytes and it {found}. "
            "Download it again."
        )
    return torch.frombuffer(entries, dtype=torch.uint8).reshape(shape) if entries else torch.empty(shape).byte()


def _up_to(stream: io.BufferedIOBase, num_bytes: int) -> bytearray:
    """Read at most ``num_bytes``, piece by piece: a header may announce more than memory holds."""
    found = bytearray()
    while len(found) < num_bytes:
        piece = stream.read(min(_CHUNK_BYTES, num_bytes - len(found)))
        if not piece:
            break
        found += piece
    return found


def _what_it_is(magic: bytes) -> str:
    if len(magic) < 4:
        return "It ends before its header does. "
    if magic[:2] == b"\0\0" and magic[2] == _UNSIGNED_BYTES and 1 <= magic[3] <= 4:
        kind = {1: "labels", 3: "images"}.get(magic[3], f"entries in {magic[3]} dimensions")
        return f"It is an idx file of {kind}. "
    return ""


def _shown(start: bytes) -> str:
    return f"0x{start.hex()}" if start else "nothing (it is empty)"
