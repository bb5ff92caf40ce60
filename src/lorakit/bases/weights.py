"""A base's weights one at a time, straight from its safetensors files: no model is built, no file is read whole.

Tensors are memory-mapped: what is not looked at is not read, and what was looked at need not stay in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lorakit.adapters import AdapterState, SiteState
from lorakit.adapters.identity import Identity, has_sample_of
from lorakit.bases.header import TensorInfo, read_header
from lorakit.bases.outline import describe_model
from lorakit.errors import BaseMismatchError, quoted

_KERNELS = {"conv1d": 3, "conv2d": 4, "conv3d": 5}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class FileWeights:
    """Base weights of an adapter's layers, by layer path.

    Attributes:
        files: the file and the tensor's name in it.
        kinds: the layers' kinds, which say how a weight looks as a matrix.
    """

    files: Mapping[str, tuple[Path, str]]
    kinds: Mapping[str, str]

    def matrix(self, path: str) -> Tensor:
        """Return one weight as ``[d_out, d_in]`` in its own dtype, memory-mapped."""
        weight = self.native(path)
        return weight.t() if self.kinds[path] in ("transposed", "embedding") else weight.flatten(1)

    def native(self, path: str) -> Tensor:
        """Return one weight as it is stored."""
        file, name = self.files[path]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def open_weights(folder: Path, state: AdapterState) -> FileWeights | None:
    """Find the base weights of an adapter's layers in a model folder.

    Returns:
        None where the files alone do not say which tensor belongs to which layer (other names, fused or
        stacked weights, quantised ones): then the model has to be loaded.

    Raises:
        FormatError: the folder has no safetensors file, or a broken one.
        BaseMismatchError: the weights are not those that the adapter was trained on.
    """
    tensors = {tensor.name: tensor for tensor in read_header(folder)}
    renamed = _renaming(list(state.sites), tensors)
    if renamed is None or not all(_fits(site, tensors[renamed[path]]) for path, site in state.sites.items()):
        return None
    if _orientation_open(state) and any(line.kind == "Conv1D" for line in describe_model(folder).layers):
        return None
    files = {path: (_file(folder, tensors[name]), name) for path, name in renamed.items()}
    weights = FileWeights(files, {path: site.kind for path, site in state.sites.items()})
    if state.identity is not None:
        _check(weights, state.identity, state.base_name, folder)
    return weights


def _renaming(paths: list[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str] | None:
    """Return every layer's tensor, under one renaming for all: a prefix that only the model or only the file has."""
    for less, more in [("", ""), *_prefixes(paths[0], tensors)]:
        renamed = {path: f"{more}{path.removeprefix(less)}.weight" for path in paths if path.startswith(less)}
        if len(renamed) == len(paths) and all(name in tensors for name in renamed.values()):
            return renamed
    return None


def _prefixes(path: str, tensors: Mapping[str, TensorInfo]) -> list[tuple[str, str]]:
    """Return what may be taken from a path, and put before it, so that a tensor has that name; none where in doubt."""
    wanted = f"{path}.weight"
    starts = [wanted[: place + 1] for place, letter in enumerate(path) if letter == "."]
    found = [(start, "") for start in starts if wanted.removeprefix(start) in tensors]
    found += [("", name.removesuffix(wanted)) for name in tensors if name.endswith(f".{wanted}")]
    return found if len(found) == 1 else []


def _fits(site: SiteState, tensor: TensorInfo) -> bool:
    """Tell whether a tensor is the plain weight of a layer: a matrix or a kernel of floating-point numbers."""
    if site.kind not in ("linear", "transposed", "embedding", *_KERNELS) or tensor.dtype not in _FLOATS:
        return False
    return len(tensor.shape) == _KERNELS.get(site.kind, 2) and tensor.shape == tuple(site.weight_shape)


def _orientation_open(state: AdapterState) -> bool:
    """Tell whether a square weight may be stored transposed without the adapter's file saying so."""
    return state.identity is None and any(
        site.kind == "linear" and len(set(site.weight_shape)) == 1 for site in state.sites.values()
    )


def _file(folder: Path, tensor: TensorInfo) -> Path:
    return (folder if folder.is_dir() else folder.parent) / tensor.file


def _check(weights: FileWeights, identity: Identity, base_name: str | None, folder: Path) -> None:
    """Look for each weight's samples among those that the adapter keeps of its base."""
    strangers = [path for path in weights.files if not has_sample_of(identity, weights.native(path))]
    if strangers:
        named = f"'{base_name}' " if base_name else ""
        raise BaseMismatchError(
            f"the adapter belongs to the base {named}({identity.short}); '{folder}' has other weights in "
            f"{len(strangers)} of its {len(weights.files)} layers: {quoted(strangers, 3)}. Give its own base with "
            "--base MODEL, or look at the update alone with --no-base."
        )
