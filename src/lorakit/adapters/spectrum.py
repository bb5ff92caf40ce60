"""Singular values of low-rank updates, from the factors alone.

With ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values of ``s B A`` are those of the small
matrix ``s R_B R_A^T`` (``[rank, rank]``): no dense ``[d_out, d_in]`` matrix is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.adapters.handle import Handle
from lorakit.layers import Site
from lorakit.records import LayerSpectrum


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Return the singular values of ``B A``, largest first.

    >>> [round(v, 4) for v in singular_values(torch.eye(2, 5), 3.0 * torch.eye(4, 2)).tolist()]
    [3.0, 3.0]

    Args:
        A: ``[rank, d_in]``.
        B: ``[d_out, rank]``.

    Returns:
        ``[min(rank, d_in, d_out)]``, fp32.
    """
    left = torch.linalg.qr(B.float(), mode="r").R
    right = torch.linalg.qr(A.float().t(), mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.t())
    return values


@torch.no_grad()
def spectra(handle: Handle, name: str | None = None) -> tuple[LayerSpectrum, ...]:
    """Return the singular values of every layer's low-rank update and its base weight's Frobenius norm."""
    found = []
    for path, update in handle.updates(name).items():
        site = Site.at(handle.model, path)
        terms = update.terms(site.ops, site.layer)
        if terms.A is None:
            continue
        values = singular_values(*terms.low_rank()).tolist()
        norm = float(torch.linalg.vector_norm(site.matrix(), dtype=torch.float32))
        found.append(LayerSpectrum(path, tuple(values), norm))
    return tuple(found)
