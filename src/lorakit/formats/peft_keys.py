"""PEFT's tensor keys: which tensor of which layer a key means, and where a layer stands in them.

of layer M               key, after base_model.model.        shape
linear, GPT-2's Conv1D   M.lora_A.weight                     [rank, d_in]
                         M.lora_B.weight                     [d_out, rank]
embedding                M.lora_embedding_A                  [rank, vocabulary]
                         M.lora_embedding_B                  [width, rank]
convolution              M.lora_A.weight                     [rank, c_in, k_1, ..., k_n]
                         M.lora_B.weight                     [c_out, rank, 1, ..., 1]
DoRA                     M.lora_magnitude_vector             [d_out], convolution [1, c_out, 1, ..., 1]
attention                M.lora_A.weight, M.lora_B.weight    of in_proj_weight
                         M.base_layer.out_proj.lora_A.weight ...
parameters p1, p2 of M   M.base_layer.lora_A.weight, ...     of p1, which was wrapped first
                         M.lora_A.weight, ...                of p2
bias of a target         M.base_layer.bias                   [d_out]
bias of another layer    M.bias
module trained in full   M.weight, ...
rows of tokens           M.token_adapter.trainable_tokens_delta   [n, width]

PEFT puts a wrapper in the place of every module that it adapts, and the module below it as ``base_layer``; around a
module with several adapted parameters there is one wrapper for each. So whatever lies below an adapted module has
``base_layer`` in its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lorakit.errors import FormatError, bullet_list

PREFIX = "base_model.model."

_UPDATE = re.compile(
    r"(?P<path>.+)\.(?P<word>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_COPY = re.compile(r"(?P<path>.+)\.modules_to_save\.(?:default\.)?(?P<name>.+)")
_ORIGINAL = re.compile(r"(?P<path>.+)\.original_module\.(?P<name>.+)")
_BASE = re.compile(r"(?P<path>.+)\.base_layer\.(?P<name>[^.]+)")
_PLAIN_LORA = re.compile(r"(^|\.)lora_")
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")
_OUTERMOST = re.compile(r"(?P<module>.*?)(?P<wrappers>(?:\.base_layer)*)")


class Address(NamedTuple):
    """Where a tensor of an update stands: the module, how many wrappers further in, and PEFT's word for it."""

    module: str
    depth: int
    word: str


def update_key(address: Address, wraps: Mapping[str, int]) -> str:
    """Return the key of a tensor of an update.

    >>> update_key(Address("attn.out_proj", 0, "lora_A"), {"attn": 1, "attn.out_proj": 1})
    'base_model.model.attn.base_layer.out_proj.lora_A.weight'

    Args:
        address: where it stands.
        wraps: number of PEFT's wrappers around every adapted module.
    """
    parent, _, last = address.module.rpartition(".")
    module = f"{_inside(parent, wraps)}.{last}" if parent else last
    suffix = ".weight" if address.word in ("lora_A", "lora_B") else ""
    return f"{PREFIX}{module}{'.base_layer' * address.depth}.{address.word}{suffix}"


def base_key(name: str, wraps: Mapping[str, int]) -> str:
    """Return the key of one of the base's own parameters.

    >>> base_key("attn.out_proj.bias", {"attn": 1, "attn.out_proj": 1})
    'base_model.model.attn.base_layer.out_proj.base_layer.bias'
    """
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{_inside(module, wraps)}.{last}" if module else f"{PREFIX}{name}"


def _inside(module: str, wraps: Mapping[str, int]) -> str:
    parts = module.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return ".".join(part + ".base_layer" * wraps.get(path, 0) for part, path in zip(parts, paths, strict=True))


@dataclass
class Sorted:
    """A file's tensors by what they are; paths are the base's own, without wrappers.

    Attributes:
        updates: by module and depth, by PEFT's word ('lora_A').
        plain: tensors under the base's own names: modules trained in full, and biases.
        base: what ``base_layer`` holds beside an update, and originals of modules trained in full, by
            the base's names.
        wrapped: modules that have other modules' tensors below their ``base_layer``.
        problems: keys that were not understood, with the reason.
    """

    updates: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    wrapped: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def sort_keys(tensors: Mapping[str, Tensor]) -> Sorted:
    """Sort a file's tensors by what their keys mean, with or without prefix and adapter's name."""
    found = Sorted()
    adapters: set[str] = set()
    copies: dict[str, Tensor] = {}
    for key in sorted(tensors, key=natural):
        tensor, name = tensors[key], key.removeprefix(PREFIX)
        if tensor.numel() == 0:
            what = "a shard of ZeRO-3 or FSDP that was not gathered"
            found.problems.append(f"'{key}' is empty {tuple(tensor.shape)}: {what}")
        elif update := _UPDATE.fullmatch(name):
            if update["adapter"] is not None:
                adapters.add(update["adapter"])
            _put_update(found, key, update["path"], update["word"], update["leaf"], tensor)
        elif _PLAIN_LORA.search(name):
            found.problems.append(f"'{key}' is not understood")
        elif copy := _COPY.fullmatch(name):
            copies[f"{copy['path']}.{copy['name']}"] = tensor
        elif original := _ORIGINAL.fullmatch(name):
            found.base[f"{original['path']}.{original['name']}"] = tensor
        elif base := _BASE.fullmatch(name):
            module = unwrapped(base["path"]).removesuffix(".token_adapter")
            found.base[f"{module}.{base['name']}"] = tensor
        elif unwrapped(name) in found.plain:
            found.problems.append(f"'{key}' is there twice, with and without the prefix '{PREFIX}'")
        else:
            found.plain[unwrapped(name)] = tensor
    if len(adapters) > 1:
        found.problems.append(f"several adapters in one file ({', '.join(sorted(adapters))})")
    for name, tensor in copies.items():  # PEFT repeats a head's bias so with bias='all'
        if not _same(found.plain.setdefault(name, tensor), tensor):
            found.problems.append(f"'{name}' is there twice with different values")
    return found


def holds_base(tensors: Iterable[str]) -> bool:
    """Tell whether any key can be one of the base's own tensors, without looking at the others."""
    return any(".base_layer." in key or ".original_module." in key for key in tensors)


def unwrapped(path: str) -> str:
    """Return a path without PEFT's wrappers."""
    return _WRAPPER.sub("", path)


def _put_update(found: Sorted, key: str, path: str, word: str, leaf: str | None, tensor: Tensor) -> None:
    """Put one tensor of an update under its module."""
    outermost = _OUTERMOST.fullmatch(path)
    assert outermost is not None
    place = unwrapped(path), len(_WRAPPER.findall(outermost["wrappers"]))
    if leaf == "bias":
        found.problems.append(f"'{key}' is a bias inside the update (PEFT's lora_bias), which is not supported")
    elif word in found.updates.setdefault(place, {}):
        found.problems.append(f"'{key}' is there twice, with and without prefix or adapter's name")
    else:
        found.updates[place][word] = tensor
        above = outermost["module"]
        found.wrapped |= {unwrapped(above[: wrapper.start()]) for wrapper in _WRAPPER.finditer(above)}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def natural(text: str) -> str:
    """Return a sort key by which block 2 comes before block 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(12), text)


def raise_problems(place: str, problems: list[str], advice: str = "") -> None:
    """Raise a FormatError that lists every problem, or return where there is none."""
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise FormatError(f"{place}: {bullet_list(shown)}{advice}")
