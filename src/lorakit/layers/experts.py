"""Stacked expert weights of transformers' mixtures of experts: three-dimensional parameters, one update per expert.

    gate_up_proj [E, 2 * intermediate, hidden]      down_proj [E, hidden, intermediate]
    as [E, d_in, d_out] where the class says ``is_transposed`` (GPT-OSS), with biases [E, d_out] where it has some

A and B have the same leading dimension: ``A[E, rank, d_in]``, ``B[E, d_out, rank]``. The module runs with
the updated stacks, whichever implementation (loop, batched, grouped) the model has chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from lorakit.layers.ops import LayerOps, Runs, WeightOps


class StackOps(WeightOps):
    """A parameter that is a matrix or a stack of them, stored ``[..., d_out, d_in]`` or transposed."""

    @override
    def stack(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(self.weight(layer).shape[:-2])

    @override
    def matrix_shape(self, layer: nn.Module, weight_shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = weight_shape[-2:]
        return (columns, rows) if _is_transposed(layer) else (rows, columns)

    @override
    def as_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT if _is_transposed(layer) else weight

    @override
    def as_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT.contiguous() if _is_transposed(layer) else matrix


class ExpertsOps(StackOps):
    """One stack of an experts module: every class that takes transformers' choice of implementations."""

    kind = "experts"
    hosts: ClassVar[tuple[str, ...]] = ()
    matrix_input = True

    def __init__(self, parameter: str = "gate_up_proj") -> None:
        super().__init__(parameter, f"{parameter}_bias")

    @classmethod
    @override
    def covers(cls, kind: type[nn.Module]) -> bool:
        moe = sys.modules.get("transformers.integrations.moe")
        if moe is None:
            return False
        cells = [cell.cell_contents for cell in getattr(kind.forward, "__closure__", None) or ()]
        return any(isinstance(content, moe.ExpertsInterface) for content in cells)

    @override
    def refusal(self, layer: nn.Module) -> str | None:
        """Refuse weights that are not of a floating-point type of at least 16 bits."""
        narrow = [name for name in self.read_parameters(layer) if layer.get_parameter(name).element_size() < 2]
        return f"its weights {', '.join(narrow)} are quantised" if narrow else None

    @override
    def read_parameters(self, layer: nn.Module) -> list[str]:
        return [name for name, p in layer._parameters.items() if p is not None and p.dim() == 3]

    @override
    def places(self, layer: nn.Module) -> Mapping[str, LayerOps]:
        return {name: ExpertsOps(name) for name in self.read_parameters(layer)}

    @override
    def parts(self, layer: nn.Module) -> Mapping[str, Runs]:
        if self.parameter != "gate_up_proj":
            return {}
        rows = self.dims(layer)[0]
        if _flag(layer, "is_concatenated", True):
            return {"gate": ((0, rows // 2),), "up": ((rows // 2, rows),)}
        return {name: tuple((i, i + 1) for i in range(first, rows, 2)) for first, name in enumerate(("gate", "up"))}


def _is_transposed(layer: nn.Module) -> bool:
    return _flag(layer, "is_transposed", False)


def _flag(layer: Any, name: str, default: bool) -> bool:
    return bool(getattr(layer, name, default))
