"""Which base a tensor file belongs to: a cheap fingerprint (identity) and a full one (digest).

The *identity* travels with every saved adapter and is checked when it is loaded. It has two parts: the
``structure`` (a hash over every parameter's name and shape) and the ``sketch`` (a few values of every
parameter, rounded to bf16). Rounding makes one checkpoint the same base in fp32 and in bf16, where a
hash over bytes would call them strangers; another fine-tune of the same architecture differs in the
sketch. The *digest* hashes every byte and is what proves that training left the base alone.

Rows of a table that an adapter trains whole (``embed_tokens[32000:32010]``) do not count, and neither does whether the
table has them: a base before its vocabulary grew and after it have one identity without the new rows.

Only the base counts: an adapter's tensors live in a submodule called ``lorakit`` on their host layer,
so every name with that segment is skipped. A tied tensor counts once, under the first of its names in
alphabetical order. Buffers that are not saved with a model never count.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.walk import walk, walk_parameters
from lorakit.errors import FormatError, ModelError, quoted
from lorakit.layers.ops import Runs
from lorakit.layers.site import runs_of

SAMPLES_PER_TENSOR = 8

_VERSION = "1"
_PREFIX = "lorakit.base."
# Modules that torch puts around another one without changing it; their segment is not part of a base name.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DTYPE_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
# Both of these round to bf16 in one step, so one checkpoint gives the same sketch bit for bit in either.
_ROUNDED_ONCE = frozenset({"fp32", "bf16"})
# Half of the spacing of fp16's subnormals, 2**-24: what a tiny weight may have lost on its way through fp16.
_FP16_UNDERFLOW = 2.0**-25
_CHUNK_BYTES = 16 * 2**20
_ROWS = re.compile(r"(?P<path>.+)\[(?P<parts>\d+:\d+(,\d+:\d+)*)\]")


@dataclass(frozen=True)
class Identity:
    """What tells one base model from another.

    Attributes:
        structure: 32 hexadecimal digits over the sorted ``(name, shape)`` of every base parameter.
        sketch: base64 of bf16 values, ``SAMPLES_PER_TENSOR`` evenly spaced per parameter, sorted by name.
        dtype: the dtype most of the numbers have: 'fp32', 'bf16', 'fp16', or torch's own word.
        excluded: paths of what is left out: new heads, modules trained in full, and rows of tokens.
        num_tensors: parameters counted.
        num_parameters: numbers in them.
    """

    structure: str
    sketch: str
    dtype: str
    excluded: tuple[str, ...] = ()
    num_tensors: int = 0
    num_parameters: int = 0

    @property
    def short(self) -> str:
        """Twelve hexadecimal digits that stand for structure and sketch in a line of text."""
        return hashlib.sha256(f"{self.structure}{self.sketch}".encode()).hexdigest()[:12]

    def to_metadata(self) -> dict[str, str]:
        """Return string pairs for a safetensors header, all keys under ``lorakit.base.``."""
        return {
            f"{_PREFIX}identity": _VERSION,
            f"{_PREFIX}structure": self.structure,
            f"{_PREFIX}sketch": self.sketch,
            f"{_PREFIX}dtype": self.dtype,
            f"{_PREFIX}excluded": json.dumps(list(self.excluded)),
            f"{_PREFIX}num_tensors": str(self.num_tensors),
            f"{_PREFIX}num_parameters": str(self.num_parameters),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Identity | None:
        """Read what ``to_metadata`` wrote; None where the file carries no identity.

        Raises:
            FormatError: an identity is there but broken, or of a version that is not known here.
        """
        version = metadata.get(f"{_PREFIX}identity")
        if version is None:
            return None
        if version != _VERSION:
            raise FormatError(
                f"the base's identity has version {version!r}; this lorakit reads version {_VERSION}. "
                "Use a newer lorakit."
            )
        try:
            sketch = metadata[f"{_PREFIX}sketch"]
            base64.b64decode(sketch, validate=True)
            return cls(
                structure=metadata[f"{_PREFIX}structure"],
                sketch=sketch,
                dtype=metadata[f"{_PREFIX}dtype"],
                excluded=tuple(str(path) for path in json.loads(metadata[f"{_PREFIX}excluded"])),
                num_tensors=int(metadata[f"{_PREFIX}num_tensors"]),
                num_parameters=int(metadata[f"{_PREFIX}num_parameters"]),
            )
        except KeyError as error:
            raise FormatError(f"the base's identity lacks {error}. Save the adapter again.") from error
        except (binascii.Error, ValueError) as error:
            raise FormatError(f"the base's identity cannot be read ({error}). Save the adapter again.") from error


@dataclass(frozen=True)
class Mismatch:
    """Why a model is not the base it should be: ``kind`` 'structure' or 'weights', and a sentence."""

    kind: str
    message: str

    def __str__(self) -> str:
        return self.message


def identify(model: nn.Module, exclude: Iterable[str] = ()) -> Identity:
    """Take the identity of ``model`` without the modules, and the rows of modules, at the paths ``exclude``.

    Reads ``SAMPLES_PER_TENSOR`` values per parameter, at fixed places: milliseconds, and the same answer
    every time.

    Raises:
        ModelError: no parameter is left, or some have no values (meta device).
    """
    excluded = tuple(sorted(set(exclude)))
    kept = _kept(model, excluded)
    if not kept:
        raise ModelError("the model has no base parameters to identify.")
    _require_values({one.name: one.tensor for one in kept})
    listing = json.dumps([(one.name, list(one.shape)) for one in kept])
    numbers: Counter[torch.dtype] = Counter()
    for one in kept:
        numbers[one.tensor.dtype] += one.num_numbers
    return Identity(
        structure=hashlib.sha256(listing.encode()).hexdigest()[:32],
        sketch=base64.b64encode(_bytes(_samples(kept))).decode("ascii"),
        dtype=_dtype_word(max(numbers, key=lambda dtype: (numbers[dtype], str(dtype)))),
        excluded=excluded,
        num_tensors=len(kept),
        num_parameters=sum(numbers.values()),
    )


def compare(saved: Identity, model: nn.Module) -> Mismatch | None:
    """Tell how ``model`` differs from the base that ``saved`` was taken of; None if it does not.

    The sampled values must be bit-equal where both were rounded to bf16 in one step (fp32, bf16, or twice
    the same dtype); through any other dtype they may be one bf16 step apart, or lost in fp16's underflow.
    """
    found = identify(model, saved.excluded)
    if found.structure != saved.structure:
        return Mismatch(
            "structure",
            f"structure differs (names or shapes): expected {saved.num_tensors} parameters with "
            f"{saved.num_parameters:,} numbers, found {found.num_tensors} with {found.num_parameters:,}",
        )
    expected, actual = _decoded(saved.sketch), _decoded(found.sketch)
    if expected.shape != actual.shape:
        raise FormatError(f"the base's identity holds {expected.numel()} samples; {actual.numel()} belong in it.")
    differs = ~_agree(expected, actual, saved.dtype, found.dtype)
    if not bool(differs.any()):
        return None
    first = _owner_of_sample(model, saved.excluded, int(differs.nonzero()[0]))
    return Mismatch(
        "weights",
        f"same architecture, other weights: {int(differs.sum())} of {differs.numel()} sampled values differ, "
        f"first in '{first}'",
    )


def has_sample_of(saved: Identity, tensor: Tensor) -> bool:
    """Tell whether the values that are sampled of ``tensor`` stand side by side among those of a base.

    They are compared as :func:`compare` does. Of a tensor with fewer numbers than are sampled nothing can be told
    (True).
    """
    expected, own = _decoded(saved.sketch), _samples([_Kept("", tensor)]).view(torch.int16)
    if len(own) < SAMPLES_PER_TENSOR or len(expected) < len(own):
        return True
    windows = expected.unfold(0, len(own), 1)
    return bool(_agree(windows, own.expand_as(windows), saved.dtype, _dtype_word(tensor.dtype)).all(dim=1).any())


def digest(model: nn.Module, exclude: Iterable[str] = ()) -> str:
    """Hash every byte of every base parameter and persistent buffer (sha256, 64 hexadecimal digits).

    Name, dtype, shape and content all count; device and memory layout do not. Tensors are read in chunks,
    so at most one of them (a non-contiguous one) is copied at a time.

    Raises:
        ModelError: some tensors have no values (meta device).
    """
    excluded = tuple(exclude)
    tensors = dict([*base_parameters(model, excluded), *base_buffers(model, excluded)])
    _require_values(tensors)
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().contiguous().reshape(-1)
        step = max(1, _CHUNK_BYTES // tensor.element_size())
        for start in range(0, flat.numel(), step):
            whole.update(_bytes(flat[start : start + step]))
    return whole.hexdigest()


def non_finite(model: nn.Module) -> list[str]:
    """Name the base parameters that contain NaN or an infinity, in alphabetical order."""
    return [name for name, tensor in base_parameters(model) if not _is_finite(tensor.detach())]


def base_parameters(model: nn.Module, exclude: Iterable[str] = ()) -> list[tuple[str, Tensor]]:
    """List the base's own parameters by name; a tied tensor once, adapters and ``exclude`` left out."""
    return _own(walk_parameters(model, remove_duplicate=False), exclude)


def base_buffers(model: nn.Module, exclude: Iterable[str] = ()) -> list[tuple[str, Tensor]]:
    """List the base's persistent buffers by name, as ``base_parameters`` lists its parameters."""
    return _own(_persistent_buffers(model), exclude)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in walk(model, remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


def _own(named: Iterable[tuple[str, Tensor]], exclude: Iterable[str]) -> list[tuple[str, Tensor]]:
    excluded = tuple(exclude)
    first_names: dict[int, tuple[str, Tensor]] = {}
    for raw_name, tensor in named:
        name = _unwrapped(raw_name)
        if any(name == path or name.startswith(f"{path}.") for path in excluded):
            continue
        known = first_names.get(id(tensor))
        if known is None or name < known[0]:
            first_names[id(tensor)] = (name, tensor)
    return sorted(first_names.values(), key=lambda pair: pair[0])


def _unwrapped(name: str) -> str:
    """Return a name without the segments of modules that torch puts around others."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def _require_values(tensors: Mapping[str, Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{len(empty)} of {len(tensors)} tensors have no values (meta device): {quoted(empty, 3)}. "
            "Load the model's weights first."
        )


@dataclass(frozen=True)
class _Kept:
    """A base parameter without the rows ``runs``, which it may have or not."""

    name: str
    tensor: Tensor
    runs: Runs = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if not self.runs:
            return tuple(self.tensor.shape)
        rows = self.tensor.shape[0]
        left_out = sum(min(stop, rows) - min(start, rows) for start, stop in self.runs)
        return rows - left_out, *self.tensor.shape[1:]

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def num_samples(self) -> int:
        return min(SAMPLES_PER_TENSOR, self.num_numbers)

    def places(self) -> tuple[int, ...]:
        """Return where its samples are in the flat tensor."""
        return _places(self.num_numbers, self.num_samples, math.prod(self.tensor.shape[1:]), self.runs)


@functools.lru_cache(maxsize=1024)
def _places(num_numbers: int, count: int, width: int, left_out: Runs) -> tuple[int, ...]:
    """Return where the samples of a tensor are in it, flat.

    Args:
        num_numbers: its numbers without the rows ``left_out``.
        count: samples to take, evenly spaced.
        width: numbers in a row.
        left_out: rows that do not count.
    """
    found = []
    for i in range(count):
        row, column = divmod(i * (num_numbers - 1) // max(count - 1, 1), max(width, 1))
        for start, stop in left_out:
            row += stop - start if row >= start else 0
        found.append(row * width + column)
    return tuple(found)


def _kept(model: nn.Module, excluded: Iterable[str]) -> list[_Kept]:
    """List the base's parameters by name, each without its rows among ``excluded``."""
    excluded = tuple(excluded)
    rows = {part["path"]: runs_of(part["parts"]) for path in excluded if (part := _ROWS.fullmatch(path)) is not None}
    runs: dict[int, Runs] = {}
    for name, tensor in walk_parameters(model, remove_duplicate=False) if rows else ():
        holder = _unwrapped(name).rpartition(".")[0]
        if holder in rows:
            runs[id(tensor)] = rows[holder]
    return [_Kept(name, tensor, runs.get(id(tensor), ())) for name, tensor in base_parameters(model, excluded)]


def _samples(parameters: Iterable[_Kept]) -> Tensor:
    """Return the sampled values of all tensors as one bf16 vector on the CPU, one transfer per device."""
    parameters = list(parameters)
    by_device: dict[torch.device, list[int]] = {}
    for i, one in enumerate(parameters):
        by_device.setdefault(one.tensor.device, []).append(i)
    pieces: dict[int, Tensor] = {}
    for device, own in by_device.items():
        places = [parameters[i].places() for i in own]
        sizes = [len(some) for some in places]
        index = torch.tensor([place for some in places for place in some], dtype=torch.int64, device=device)
        tensors = [parameters[i].tensor.detach() for i in own]
        taken = [torch.take(tensor, some) for tensor, some in zip(tensors, torch.split(index, sizes), strict=True)]
        together = torch.cat([values.to(torch.bfloat16) for values in taken]).cpu()
        pieces.update(zip(own, torch.split(together, sizes), strict=True))
    return torch.cat([pieces[i] for i in range(len(parameters))])


def _owner_of_sample(model: nn.Module, excluded: tuple[str, ...], index: int) -> str:
    for one in _kept(model, excluded):
        index -= one.num_samples
        if index < 0:
            return one.name
    raise IndexError(index)


def _decoded(sketch: str) -> Tensor:
    """Return a sketch's values as the bits of bf16, ``int16``."""
    raw = bytearray(base64.b64decode(sketch))
    return torch.frombuffer(raw, dtype=torch.int16) if raw else torch.empty(0, dtype=torch.int16)


def _agree(a: Tensor, b: Tensor, dtype_of_a: str, dtype_of_b: str) -> Tensor:
    """Compare bf16 bits of values that were stored in these dtypes before: equal, or one step where rounded twice."""
    exact = dtype_of_a == dtype_of_b or {dtype_of_a, dtype_of_b} <= _ROUNDED_ONCE
    return a == b if exact else _within_one_step(a, b)


def _within_one_step(a: Tensor, b: Tensor) -> Tensor:
    """Compare bf16 bits: neighbours in the order of all bf16 numbers, or both lost in fp16's underflow."""
    steps = (_rank_of(a) - _rank_of(b)).abs()
    distance = (a.view(torch.bfloat16).double() - b.view(torch.bfloat16).double()).abs()
    return (steps <= 1) | (distance <= _FP16_UNDERFLOW)


def _rank_of(bits: Tensor) -> Tensor:
    """Number the bf16 values in increasing order; both zeros get 0."""
    wide = bits.to(torch.int32)
    return torch.where(wide >= 0, wide, -(wide & 0x7FFF))


def _bytes(values: Tensor) -> memoryview:
    """Return the memory of a contiguous vector, copied to the CPU if need be."""
    return values.cpu().view(torch.uint8).numpy().data


def _is_finite(values: Tensor) -> bool:
    if not values.dtype.is_floating_point or values.numel() == 0:
        return True
    if values.element_size() == 1:
        values = values.float()
    # aminmax carries NaN through and needs no tensor of the weight's size.
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _dtype_word(dtype: torch.dtype) -> str:
    return _DTYPE_WORDS.get(dtype, str(dtype).removeprefix("torch."))
