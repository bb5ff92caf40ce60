"""Orthogonal start: both factors are live from the first step, and the model's function is kept to the last bit.

After the start that PEFT calls so (Datta 2024, https://datta0.github.io/posts/rethink-lora-init/).

    A = [A_1; 0],   B = [0, B_2],    A_1 A_1^T = I / 3,   B_2^T B_2 = I / 3

``A_1`` has half of the rows and ``B_2`` the other half of the columns, so that ``B A = 0``. With a gradient G of the
weight the first step of gradient descent changes it by ``-lr s^2 (G A^T A + B B^T G)``: a projection on both sides,
where ``B = 0`` has the first term alone, and a random A weighs its directions unevenly. Rows and columns are as long
as those of the Kaiming start, so that the same learning rates fit.

Difference from PEFT: there a random rotation mixes the two halves, which is the same for gradient descent, but leaves
``B A = 0`` to rounding only, and asks for an even rank. For an embedding ``A = 0`` and B has orthogonal columns, as
long as those of its Kaiming start.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakit.inits.init import Init
from lorakit.layers import Site


class Orthogonal(Init):
    """Half of A and the other half of B are orthogonal, the rest is zero."""

    name: ClassVar[str] = "orthogonal"

    def draw(
        self, site: Site, rank: int, scale: float, generator: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the starting pair, see :class:`Init`."""
        A, B = torch.zeros(*site.stack, rank, site.d_in), torch.zeros(*site.stack, site.d_out, rank)
        if site.ops.input_is_index:
            return A, math.sqrt(site.d_out) * orthonormal(site.stack, site.d_out, rank, generator)
        half = rank - rank // 2
        A[..., :half, :] = orthonormal(site.stack, site.d_in, half, generator).mT / math.sqrt(3.0)
        B[..., :, half:] = orthonormal(site.stack, site.d_out, rank - half, generator) / math.sqrt(3.0)
        return A, B


def orthonormal(stack: tuple[int, ...], size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[size, count]`` with orthonormal columns, uniform over all such (Mezzadri 2007, math-ph/0609050)."""
    Q, R = torch.linalg.qr(torch.randn(*stack, size, count, generator=generator))
    signs = R.diagonal(dim1=-2, dim2=-1).sign()
    columns: Tensor = Q * signs[..., None, :]
    return columns
