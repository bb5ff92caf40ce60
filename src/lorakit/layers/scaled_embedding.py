"""Embeddings that multiply by a constant: ``y = embed_scale * W[token]`` (Gemma's, BART's and others')."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from typing_extensions import override

from lorakit.layers.embedding import EmbeddingOps

_OTHERWISE = ("T5Gemma2TextScaledWordEmbedding",)  # one token has an embedding of its own beside the table


class ScaledEmbeddingOps(EmbeddingOps):
    """As :class:`EmbeddingOps`, with the update multiplied by the same constant."""

    kind = "scaled_embedding"
    hosts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @override
    def covers(cls, kind: type[nn.Module]) -> bool:
        owner = kind.forward.__qualname__.split(".")[0]
        named = owner.endswith("ScaledWordEmbedding") and owner not in _OTHERWISE
        return named and issubclass(kind, nn.Embedding) and kind.forward.__module__.startswith("transformers.")

    @override
    def up(self, layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
        return self.scaled(layer, super().up(layer, h, B))

    @override
    def scaled(self, layer: nn.Module, found: Tensor) -> Tensor:
        scale = cast(Any, layer).embed_scale
        return found * (scale.to(found.dtype) if isinstance(scale, Tensor) else scale)
