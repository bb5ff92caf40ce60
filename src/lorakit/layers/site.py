"""``Site``: one place in a model where an update acts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.layers.ops import LayerOps, ops_for


@dataclass(frozen=True)
class Site:
    """A layer that an update belongs to.

    Attributes:
        path: the layer's name in the model, as in ``named_modules()``.
        layer: the layer itself, adapted or not.
        ops: how to multiply by its weight.
    """

    path: str
    layer: nn.Module
    ops: LayerOps

    @classmethod
    def at(cls, model: nn.Module, path: str) -> Site:
        """Make the site of the layer at ``path``.

        Raises:
            UnsupportedLayerError: the layer's kind or options cannot be adapted.
        """
        layer = model.get_submodule(path)
        return cls(path, layer, ops_for(path, layer))

    @property
    def d_out(self) -> int:
        """Rows of the weight as a matrix."""
        return self.ops.dims(self.layer)[0]

    @property
    def d_in(self) -> int:
        """Columns of the weight as a matrix."""
        return self.ops.dims(self.layer)[1]

    def matrix(self) -> Tensor:
        """Return the base weight as ``[d_out, d_in]`` in its own dtype, detached."""
        return self.ops.as_matrix(self.layer, self.ops.weight(self.layer).detach())
