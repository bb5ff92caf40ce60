"""What layers a model has, with their shapes and the names a target can use, without its weights."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapters.identity import base_parameters
from lorakit.bases.header import TensorInfo, read_header
from lorakit.bases.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LINEAR_KINDS = frozenset({"Linear", "Conv1D"})
"""Kinds that are one matrix product: what the word ``all-linear`` is about."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPE_WORDS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}


@dataclass(frozen=True)
class LayerLine:
    """One layer with a weight.

    Attributes:
        path: the module's path; for a bare parameter of three or more dimensions, the parameter's.
        kind: 'Linear', 'Conv1D' (GPT-2's transposed one), 'Embedding', 'Conv2d', 'norm', 'stack' (one
            matrix per expert), or the class's name where it is none of these.
        d_out, d_in: the weight as a matrix ``[d_out, d_in]``; an embedding takes one of ``d_in`` tokens,
            a norm's vector is ``[d_out, 1]``.
        num_parameters: numbers in the layer, biases included; 0 where the weight is tied to one before.
    """

    path: str
    kind: str
    d_out: int
    d_in: int
    num_parameters: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ in their numbers only: ``model.layers.{0..7}.self_attn.q_proj``."""

    pattern: str
    kind: str
    d_out: int
    d_in: int
    count: int
    num_parameters: int

    def __str__(self) -> str:
        shape = str(self.d_out) if self.kind == "norm" else f"{self.d_in} -> {self.d_out}"
        return f"{self.pattern}  {self.kind} {shape}"


@dataclass(frozen=True)
class ModelOutline:
    """A model's layers, read from its files or from a live model.

    Attributes:
        model_type: transformers' word for the architecture, '' where there is none.
        architectures: class names that the config gives, or the live model's class.
        num_params: numbers in the model, tied ones once.
        dtype: what most of them are stored in: 'fp32', 'bf16', 'fp16', ...
        layers: one line per layer with a weight, in the model's order.
        exact: False where the kinds were guessed from names and shapes, because the architecture could
            not be built.
    """

    model_type: str
    architectures: tuple[str, ...]
    num_params: int
    dtype: str
    layers: tuple[LayerLine, ...]
    exact: bool = True

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers with their numbers folded into ranges, in the model's order."""
        return group_layers(self.layers)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Last names of the linear layers that are not tied (``q_proj``, ...), usable as targets."""
        names = [
            line.path.rpartition(".")[2] for line in self.layers if line.kind in LINEAR_KINDS and line.num_parameters
        ]
        return tuple(dict.fromkeys(name for name in names if name and not name.isdecimal()))


def describe_model(folder: str | os.PathLike[str]) -> ModelOutline:
    """Outline the model in ``folder`` from its config and its safetensors header; loads no weight.

    The architecture is built without memory (meta device) to know every layer's kind. Where that cannot
    be done (code of the model's repository, an unknown type), kinds are guessed from the header.

    Raises:
        ModelError: no such folder.
        FormatError: no safetensors weights there, or broken ones.
    """
    tensors = read_header(folder)
    values = _config_values(Path(folder))
    model = _on_meta(folder, values) if values else None
    dtype = stored_dtype(tensors)
    kind, architectures = str(values.get("model_type", "")), tuple(values.get("architectures") or ())
    if model is None:
        num_params = sum(tensor.num_elements for tensor in tensors)
        return ModelOutline(kind, architectures, num_params, dtype, tuple(_guessed(tensors)), exact=False)
    outline = describe_module(model)
    return ModelOutline(kind, architectures or outline.architectures, outline.num_params, dtype, outline.layers)


def describe_module(model: nn.Module) -> ModelOutline:
    """Outline a live model; adapters attached to it are left out."""
    parameters = [parameter for _, parameter in base_parameters(model)]
    numbers: Counter[str] = Counter()
    for parameter in parameters:
        numbers[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    stored = numbers.most_common(1)[0][0] if numbers else ""
    words = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
    config = getattr(model, "config", None)
    return ModelOutline(
        model_type=str(getattr(config, "model_type", "")),
        architectures=(type(model).__name__,),
        num_params=sum(numbers.values()),
        dtype=words.get(stored, stored),
        layers=tuple(_lines(model)),
    )


def group_layers(lines: Iterable[LayerLine]) -> tuple[LayerGroup, ...]:
    """Fold layers that differ in the numbers of their paths only; unequal shapes stay apart.

    A group stands for every combination of its ranges; where some are not there, it is split.
    """
    alike: dict[tuple[str, str, int, int], list[LayerLine]] = defaultdict(list)
    for line in lines:
        alike[re.sub(r"(?<![^.])\d+(?![^.])", "{}", line.path), line.kind, line.d_out, line.d_in].append(line)
    groups = []
    for (template, kind, d_out, d_in), members in alike.items():
        numbered = [(tuple(int(part) for part in line.path.split(".") if part.isdecimal()), line) for line in members]
        for block in _full_blocks([numbers for numbers, _ in numbered]):
            inside = [line for numbers, line in numbered if numbers in block]
            ranges = [_range_text(sorted({numbers[i] for numbers in block})) for i in range(template.count("{}"))]
            total = sum(line.num_parameters for line in inside)
            groups.append(LayerGroup(template.format(*ranges), kind, d_out, d_in, len(inside), total))
    return tuple(groups)


def _full_blocks(numbers: list[tuple[int, ...]]) -> list[set[tuple[int, ...]]]:
    """Split index tuples into sets that are the full product of their positions' values."""
    width = len(numbers[0])
    product = 1
    for i in range(width):
        product *= len({entry[i] for entry in numbers})
    if product == len(numbers):
        return [set(numbers)]
    by_first: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for position in range(width - 1):
        if len({entry[position] for entry in numbers}) > 1:
            break
    for entry in numbers:
        by_first[entry[: position + 1]].append(entry)
    return [block for part in by_first.values() for block in _full_blocks(part)]


def _range_text(values: Sequence[int]) -> str:
    """Write ``[0, 1, 2, 5]`` as ``{0..2,5}`` and a single number as itself."""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _lines(model: nn.Module) -> Iterator[LayerLine]:
    counted: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or "lorakit" in path.split("."):
            continue
        numbers = 0
        for parameter in own.values():
            numbers += 0 if id(parameter) in counted else parameter.numel()
            counted.add(id(parameter))
        weight = own.get("weight")
        if weight is not None:
            kind = _kind(module)
            d_out, d_in = _matrix_shape(kind, tuple(weight.shape))
            yield LayerLine(path, kind, d_out, d_in, numbers)
            continue
        for name, parameter in own.items():
            if parameter.ndim >= 2:
                kind = "stack" if parameter.ndim > 2 else type(module).__name__
                full = f"{path}.{name}" if path else name
                yield LayerLine(full, kind, parameter.shape[-2], parameter.shape[-1], parameter.numel())


def _kind(module: nn.Module) -> str:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Embedding):
        return "Embedding"
    if isinstance(module, Conv1D):
        return "Conv1D"
    for convolution in _CONVOLUTIONS:
        if isinstance(module, convolution):
            return convolution.__name__
    name = type(module).__name__
    return "norm" if "norm" in name.lower() else name


def _matrix_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return ``(d_out, d_in)`` of a weight: embeddings and Conv1D are stored the other way round."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    rest = 1
    for size in shape[1:]:
        rest *= size
    return (rest, shape[0]) if kind in ("Embedding", "Conv1D") else (shape[0], rest)


def _guessed(tensors: Iterable[TensorInfo]) -> Iterator[LayerLine]:
    sizes = {tensor.name: tensor.num_elements for tensor in tensors}
    for tensor in tensors:
        path, _, leaf = tensor.name.rpartition(".")
        if leaf != "weight" or not tensor.shape:
            continue
        word = path.lower()
        kinds = {1: "norm", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}
        is_embedding = re.search(r"embed|wte|wpe", word) is not None
        kind = kinds.get(len(tensor.shape), "Embedding" if is_embedding else "Linear")
        d_out, d_in = _matrix_shape(kind, tensor.shape)
        yield LayerLine(path, kind, d_out, d_in, tensor.num_elements + sizes.get(f"{path}.bias", 0))


def _config_values(folder: Path) -> dict[str, Any]:
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def stored_dtype(tensors: Iterable[TensorInfo]) -> str:
    """Return the dtype most of a checkpoint's numbers are stored in: 'fp32', 'bf16', 'fp16', ..."""
    numbers: Counter[str] = Counter()
    for tensor in tensors:
        numbers[tensor.dtype] += tensor.num_elements
    stored = numbers.most_common(1)[0][0] if numbers else ""
    return _DTYPE_WORDS.get(stored, stored)


def _on_meta(folder: str | os.PathLike[str], values: dict[str, Any]) -> nn.Module | None:
    """Build the architecture without memory; None where transformers cannot, by itself, do it."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel

    from_config: Any = AutoModel.from_config

    if values.get("model_type") not in CONFIG_MAPPING:
        return None
    where = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    named = [getattr(transformers, str(name), None) for name in values.get("architectures") or ()]
    classes = [found for found in named if isinstance(found, type) and issubclass(found, PreTrainedModel)]
    try:
        with quiet_transformers(), torch.device("meta"):
            config: PretrainedConfig = AutoConfig.from_pretrained(where)
            built: nn.Module = classes[0](config) if classes else from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, NotImplementedError):
        return None
    return built
