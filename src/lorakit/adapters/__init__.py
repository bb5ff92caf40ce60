"""The handle on a model: targets, attaching, routing, state, merging and proofs."""

from lorakit.adapters.handle import Handle, attach, handle_of
from lorakit.adapters.state import AdapterState, SiteState

__all__ = ["AdapterState", "Handle", "SiteState", "attach", "handle_of"]
