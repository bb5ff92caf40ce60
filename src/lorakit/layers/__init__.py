"""Host layers: how to multiply by each kind of layer's weight, and what an update is."""

from lorakit.layers.ops import LayerOps, find_ops, ops_for
from lorakit.layers.site import Site
from lorakit.layers.terms import Terms, add_update

__all__ = ["LayerOps", "Site", "Terms", "add_update", "find_ops", "ops_for"]
