"""``nn.MultiheadAttention``: it multiplies by its projections itself, packed in one weight or apart.

    in_proj_weight [3 embed, embed]                                     packed; parts q, k, v
    q_proj_weight, k_proj_weight [embed, kdim], v_proj_weight           apart, where key or value have other sizes
    out_proj       [embed, embed]

The module runs with the updated weights in place of its own, its fused kernel for evaluation included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lorakit.errors import RoutingError
from lorakit.layers.ops import LayerOps, Runs, WeightOps, with_rows

_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    *("average_attn_weights", "is_causal"),
)


class AttentionOps(WeightOps):
    """One projection of an ``nn.MultiheadAttention``."""

    kind = "attention"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.activation.MultiheadAttention",)
    matrix_input = True
    is_attention = True

    def __init__(self, parameter: str = "in_proj_weight", bias_parameter: str = "in_proj_bias") -> None:
        super().__init__(parameter, bias_parameter)

    @override
    def places(self, layer: nn.Module) -> Mapping[str, LayerOps]:
        out = AttentionOps("out_proj.weight", "out_proj.bias")
        if _own(layer)._qkv_same_embed_dim:
            return {"in_proj_weight": self, "out_proj": out}
        apart = {f"{name}_proj_weight": SeparateProjectionOps(f"{name}_proj_weight") for name in "qkv"}
        return {**apart, "out_proj": out}

    @override
    def read_parameters(self, layer: nn.Module) -> list[str]:
        own = ["in_proj_weight"] if _own(layer)._qkv_same_embed_dim else [f"{name}_proj_weight" for name in "qkv"]
        return [*own, "out_proj.weight"]

    @override
    def parts(self, layer: nn.Module) -> Mapping[str, Runs]:
        size = _own(layer).embed_dim
        if self.parameter != "in_proj_weight":
            return {}
        return {name: ((i * size, (i + 1) * size),) for i, name in enumerate("qkv")}

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        if x.is_nested:
            raise RoutingError("a nested tensor meets an attention: rows cannot be routed. Pass a padded one.")
        return (x.shape[_batch_dim(layer)],) if x.dim() == 3 else ()

    @override
    def select(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Tensor, depth: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        num_rows = given["query"].shape[_batch_dim(layer)]
        chosen: dict[int, Tensor] = {}  # self-attention stays self-attention: one tensor in three places
        for name in ("query", "key", "value"):
            x = given[name]
            given[name] = chosen.setdefault(id(x), x.index_select(_batch_dim(layer), places))
        if given.get("key_padding_mask") is not None:
            given["key_padding_mask"] = given["key_padding_mask"].index_select(0, places)
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            given["attn_mask"] = _mask_rows(_own(layer), mask, num_rows, places)
        return (), given

    @override
    def put(self, layer: nn.Module, out: Any, places: Tensor, depth: int, rows: Any) -> Any:
        (found, weights), (own, own_weights) = out, rows
        found = with_rows(found, _batch_dim(layer), places, own)
        return found, None if weights is None else with_rows(weights, 0, places, own_weights)


class SeparateProjectionOps(AttentionOps):
    """``q_proj_weight`` and its kin: their biases are thirds of the packed ``in_proj_bias``."""

    hosts: ClassVar[tuple[str, ...]] = ()

    @override
    def bias(self, layer: nn.Module) -> Tensor | None:
        packed, (start, stop) = super().bias(layer), self._rows(layer)
        return None if packed is None else packed[start:stop]

    @override
    def as_bias(self, layer: nn.Module, values: Tensor) -> Tensor:
        size, (start, _) = _own(layer).embed_dim, self._rows(layer)
        return torch.nn.functional.pad(values, (start, 2 * size - start))

    def _rows(self, layer: nn.Module) -> tuple[int, int]:
        size, i = _own(layer).embed_dim, "qkv".index(self.parameter[0])
        return i * size, (i + 1) * size


def _own(layer: nn.Module) -> nn.MultiheadAttention:
    assert isinstance(layer, nn.MultiheadAttention)
    return layer


def _batch_dim(layer: nn.Module) -> int:
    return 0 if _own(layer).batch_first else 1


def _mask_rows(layer: nn.MultiheadAttention, mask: Tensor, num_rows: int, places: Tensor) -> Tensor:
    """Return the rows of a mask that has one page per row and head."""
    if mask.shape[0] != num_rows * layer.num_heads:
        raise RoutingError(
            f"attn_mask has shape {tuple(mask.shape)}, which is not one page for each of {num_rows} rows and "
            f"{layer.num_heads} heads. Give [length, length] or [{num_rows * layer.num_heads}, length, length]."
        )
    pages = mask.reshape(-1, layer.num_heads, *mask.shape[1:])
    return pages.index_select(0, places).flatten(0, 1)
