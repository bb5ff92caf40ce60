"""``nn.Bilinear``: ``y_o = x1^T W_o x2 + b_o``; the matrix is ``[d_out, in1 * in2]``."""

from __future__ import annotations

from typing import ClassVar

from lorakit.layers.ops import WeightOps


class BilinearOps(WeightOps):
    """The layer runs with the updated weight."""

    kind = "bilinear"
    hosts: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Bilinear",)
