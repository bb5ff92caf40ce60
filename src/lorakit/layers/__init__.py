"""Host layers: how to multiply by each kind of layer's weight, and what an update is."""

from lorakit.layers.ops import BranchOps, LayerOps, WeightOps, find_ops, ops_for
from lorakit.layers.site import Site, sites_of
from lorakit.layers.terms import Terms, add_update

__all__ = ["BranchOps", "LayerOps", "Site", "Terms", "WeightOps", "add_update", "find_ops", "ops_for", "sites_of"]
