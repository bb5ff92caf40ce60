"""Fast paths: each computes what a plain path computes, within a tolerance that its tests state.

``lorakit.kernels.use("plain")`` turns them off for comparison.
"""

from lorakit.kernels.switch import fast, use

__all__ = ["fast", "use"]
