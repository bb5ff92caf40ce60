"""PEFT's tensor keys: which tensor of which layer a key means, and how matrices are shaped there.

of layer M               key, after base_model.model.        shape
linear, GPT-2's Conv1D   M.lora_A.weight                     [rank, d_in]
                         M.lora_B.weight                     [d_out, rank]
embedding                M.lora_embedding_A                  [rank, vocabulary]
                         M.lora_embedding_B                  [width, rank]
conv2d                   M.lora_A.weight                     [rank, c_in, k_h, k_w]
                         M.lora_B.weight                     [c_out, rank, 1, 1]
DoRA                     M.lora_magnitude_vector             [d_out], conv2d [1, c_out, 1, 1]
bias of a target         M.base_layer.bias                   [d_out]
bias of another layer    M.bias
module trained in full   M.weight, ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorakit.adapters import SiteState
from lorakit.errors import FormatError, bullet_list

PREFIX = "base_model.model."

_UPDATE = re.compile(
    r"(?P<path>.+)\.(?P<word>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_COPY = re.compile(r"(?P<path>.+)\.modules_to_save\.(?:default\.)?(?P<name>.+)")
_ORIGINAL = re.compile(r"(?P<path>.+)\.original_module\.(?P<name>.+)")
_BASE = re.compile(r"(?P<path>.+)\.base_layer\.(?P<name>weight|bias)")
_PLAIN_LORA = re.compile(r"(^|\.)lora_")


@dataclass
class Sorted:
    """A file's tensors by what they are.

    Attributes:
        updates: by layer path, by PEFT's word ('lora_A').
        plain: tensors under the base's own names: modules trained in full, and biases.
        base: what ``base_layer`` holds beside an update, and originals of modules trained in full, by
            the base's names.
        problems: keys that were not understood, with the reason.
    """

    updates: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
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
            found.base[f"{base['path']}.{base['name']}"] = tensor
        elif name in found.plain:
            found.problems.append(f"'{key}' is there twice, with and without the prefix '{PREFIX}'")
        else:
            found.plain[name] = tensor
    if len(adapters) > 1:
        found.problems.append(f"several adapters in one file ({', '.join(sorted(adapters))})")
    for name, tensor in copies.items():  # PEFT repeats a head's bias so with bias='all'
        if not _same(found.plain.setdefault(name, tensor), tensor):
            found.problems.append(f"'{name}' is there twice with different values")
    return found


def _put_update(found: Sorted, key: str, path: str, word: str, leaf: str | None, tensor: Tensor) -> None:
    """Put one tensor of an update under its layer's path."""
    if leaf == "bias":
        found.problems.append(f"'{key}' is a bias inside the update (PEFT's lora_bias), which is not supported")
    elif ".base_layer" in f".{path}":
        what = "updates a parameter inside a layer (PEFT's target_parameters)"
        found.problems.append(f"'{key}' {what}, which is not supported")
    elif word in found.updates.setdefault(path, {}):
        found.problems.append(f"'{key}' is there twice, with and without prefix or adapter's name")
    else:
        found.updates[path][word] = tensor


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def natural(text: str) -> str:
    """Return a sort key by which block 2 comes before block 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(12), text)


def write_site(path: str, site: SiteState, words: Mapping[str, str]) -> dict[str, Tensor]:
    """Return one site's tensors under PEFT's keys and in its shapes.

    Args:
        path: the layer.
        site: its kind and matrices.
        words: PEFT's word for each of the method's tensors, on a linear layer.

    Raises:
        FormatError: PEFT has no spelling for one of them, or for this kind of layer.
    """
    if site.kind not in ("linear", "transposed", "embedding", "conv2d"):
        raise FormatError(f"PEFT's format has no spelling here for layer '{path}' of kind '{site.kind}'.")
    unknown = sorted(set(site.tensors) - set(words))
    if unknown:
        raise FormatError(f"PEFT's format has no name for the tensor '{unknown[0]}' of layer '{path}'.")
    written = {}
    for name, tensor in site.tensors.items():
        word, shaped = words[name], tensor
        if site.kind == "embedding":
            word = re.sub(r"^lora_([AB])$", r"lora_embedding_\1", word)
        elif site.kind == "conv2d":
            shaped = _as_kernel(word, tensor, site.weight_shape)
        suffix = ".weight" if word in ("lora_A", "lora_B") else ""
        written[f"{PREFIX}{path}.{word}{suffix}"] = shaped
    return written


def _as_kernel(word: str, matrix: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
    if word == "lora_A":
        return matrix.reshape(matrix.shape[0], *weight_shape[1:])
    return matrix[:, :, None, None] if word == "lora_B" else matrix[None, :, None, None]


def read_site(
    path: str, found: Mapping[str, Tensor], words: Mapping[str, str], transposed: bool
) -> tuple[SiteState | None, list[str]]:
    """Return one site from PEFT's words and shapes, or None and what is wrong with it.

    Args:
        path: the layer.
        found: its tensors by PEFT's word.
        words: PEFT's word for each of the method's tensors, on a linear layer.
        transposed: whether the file says that linear layers store ``[d_in, d_out]``.
    """
    embedding = any("embedding" in word for word in found)
    spelled = {n: re.sub(r"^lora_([AB])$", r"lora_embedding_\1", w) if embedding else w for n, w in words.items()}
    missing = [word for word in spelled.values() if word not in found]
    extra = sorted(set(found) - set(spelled.values()))
    problems = [f"'{path}' has no {word}" for word in missing]
    problems += [f"'{path}' has a {word}, which this method does not have" for word in extra]
    if problems:
        return None, problems
    tensors = {name: found[word] for name, word in spelled.items()}
    A, B = tensors["A"], tensors["B"]
    if not all(t.is_floating_point() for t in tensors.values()):
        return None, [f"'{path}' has tensors that are not of a floating-point dtype"]
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        return None, [f"'{path}' contains NaN or infinite values"]
    if (A.dim(), B.dim()) not in ((2, 2), (4, 4)) or tuple(B.shape[2:]) not in ((), (1, 1)):
        return None, [f"'{path}': A {tuple(A.shape)} with B {tuple(B.shape)} is no kind of layer that is supported"]
    if A.shape[0] != B.shape[1]:
        return None, [f"'{path}': A {tuple(A.shape)} and B {tuple(B.shape)} disagree on the rank"]
    matrices = {"A": A.flatten(1), "B": B.flatten(1)}
    for name in set(tensors) - {"A", "B"}:
        matrices[name] = tensors[name].flatten()
        if matrices[name].numel() != B.shape[0]:
            return None, [f"'{path}': {spelled[name]} {tuple(tensors[name].shape)} does not fit {B.shape[0]} outputs"]
    return _site(A, B, matrices, embedding, transposed), []


def _site(A: Tensor, B: Tensor, matrices: dict[str, Tensor], embedding: bool, transposed: bool) -> SiteState:
    d_out, d_in = B.shape[0], math.prod(A.shape[1:])
    if A.dim() == 4:
        return SiteState("conv2d", (d_out, *A.shape[1:]), matrices)
    if embedding:
        return SiteState("embedding", (d_in, d_out), matrices)
    if transposed:
        return SiteState("transposed", (d_in, d_out), matrices)
    return SiteState("linear", (d_out, d_in), matrices)


def raise_problems(place: str, problems: list[str], advice: str = "") -> None:
    """Raise a FormatError that lists every problem, or return where there is none."""
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise FormatError(f"{place}: {bullet_list(shown)}{advice}")
