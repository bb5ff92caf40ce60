"""The gradient of attention on a CPU: for short sequences in 16-bit types, by a few batched products.

torch's own kernel (``_scaled_dot_product_flash_attention_for_cpu_backward``) goes through tiles of scores and never
holds them all. In bf16 and fp16 a tile costs it about the same however short the sequences are: 9 to 13 ms for 8 rows
of 24 to 128 tokens, where the products alone take one to two. This one holds the scores of a few heads at a time:

    P  = exp(scale Q K^T + mask - lse)          dV = P^T dO
    dS = P * (dO V^T - rowsum(dO * O))          dQ = scale dS K,  dK = scale dS^T Q

What is subtracted within the exponent and the bracket is two more columns of the factors, so that the difference is
rounded to 16 bits and not its terms: scores that are large, or a bias as ALiBi's, lose nothing. The forward pass
stays torch's.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.kernels.switch import fast

BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
SCORES = 2**20
"""Scores that are held at a time; three such tensors live at once."""

LARGEST = 2.0**10
"""A row's logarithm of its sum of exponentials must be smaller, or two 16-bit numbers do not say it well enough."""

_open = 0
"""How many blocks of :func:`quick_attention` are being run."""

_library: torch.library.Library | None = None
"""What has put :func:`gradients` in the kernel's place."""


@functools.cache
def longest(dtype: torch.dtype) -> int:
    """Return up to how many queries and keys the products were measured to be faster on a processor like this one.

    With AMX they took 0.1 to 0.7 of the time up to 512, and more from 1,024 on; with AVX-512 BF16 alone 0.1 to 0.5 up
    to 128 in bf16, and as much at 256; without either torch's kernel is the faster one, as it is in fp32.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not hasattr(torch.library, "get_kernel"):  # torch < 2.9
        return 0
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    if torch.cpu._is_amx_tile_supported():
        return 512
    return 128 if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else 0


def suits(query: Tensor, key: Tensor, logsumexp: Tensor, dropout_p: float) -> bool:
    """Tell whether the products take the kernel's place for ``[B, heads, T, width]`` of these sizes and numbers."""
    return (
        fast()
        and dropout_p == 0.0
        and max(query.shape[2], key.shape[2]) <= longest(query.dtype)
        and bool(logsumexp.abs().amax() < LARGEST)
    )


@contextlib.contextmanager
def quick_attention() -> Iterator[None]:
    """Within it, attention on a CPU takes its gradient this way wherever it suits; training opens it by itself.

    It counts for the whole process, for every model whose attention is torch's ``scaled_dot_product_attention`` without
    dropout. Blocks may lie within one another, and ``kernels.use("plain")`` turns it off.
    """
    global _open, _library
    if longest(torch.bfloat16) == 0:
        yield
        return
    _open += 1
    if _library is None:
        _library = _install()
    try:
        yield
    finally:
        _open -= 1
        if _open == 0:
            _library._destroy()  # type: ignore[no-untyped-call]
            _library = None


def _install() -> torch.library.Library:
    """Put :func:`gradients` in the kernel's place and return what undoes it."""
    own = torch.library.get_kernel(f"aten::{BACKWARD}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def chosen(*given: Any, **more: Any) -> Any:
        grad, query, key, value, out, logsumexp, dropout_p, is_causal = given
        if suits(query, key, logsumexp, dropout_p):
            return gradients(grad, query, key, value, out, logsumexp, is_causal, **more)
        return own.call_boxed(keys, *given, **more)

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that it is overridden is meant
        library.impl(BACKWARD, chosen, "CPU")  # type: ignore[no-untyped-call]
    return library


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Args:
        grad: gradient of ``out``, ``[B, heads, T, width]``.
        query: ``[B, heads, T, width]``.
        key: ``[B, kv_heads, S, width]``, each for ``heads / kv_heads`` neighbouring heads of the query; value alike.
        value: may have another width, as ``out`` then does.
        out: attention's output.
        logsumexp: ``[B, heads, T]`` of the masked and scaled scores.
        is_causal: whether a query sees the keys up to its own place alone.
        attn_mask: what is added to the scores, broadcast to ``[B, heads, T, S]``.
        scale: factor on the scores; None for ``width ** -0.5``.
    """
    B, heads, T, width = query.shape
    kv_heads, S = key.shape[1:3]
    group = heads // kv_heads  # the queries of a group stand below one another, [B * kv_heads, group * T, width]
    scale = width**-0.5 if scale is None else scale
    raised = 2.0 ** round(math.log2(S) / 2)
    found = tuple(_like_activations(tensor) for tensor in (query, key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    minus_lse = _in_two((math.log(raised) - logsumexp.to(wide)) / scale, query.dtype)
    minus_sum = _in_two((grad * out).sum(-1, dtype=wide).neg_(), query.dtype)
    bias = query.new_full((T, S), float("-inf")).triu_(1).repeat(group, 1) if is_causal else None
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(B, heads, T, S)
    for own, shared in _parts(B, kv_heads, group, T * S):
        Q, K = _with_columns(query[own], group, minus_lse, own), _with_columns(key[shared])
        G, V = _with_columns(grad[own], group, minus_sum, own), _with_columns(value[shared])
        if attn_mask is not None:
            bias = attn_mask[own].reshape(-1, group * T, S)
        scores = torch.bmm(Q, K.mT).mul_(scale) if bias is None else torch.baddbmm(bias, Q, K.mT, alpha=scale)
        P = scores.exp_()
        _put(found[2][shared], torch.bmm(P.mT, G), 1 / raised)
        dS = torch.bmm(G, V.mT).mul_(P)
        _put(found[0][own], torch.bmm(dS, K), scale / raised)
        _put(found[1][shared], torch.bmm(dS.mT, Q), scale / raised)
    return found  # type: ignore[return-value]


Part = tuple[slice, slice]
"""Rows and heads."""


def _parts(B: int, kv_heads: int, group: int, scores: int) -> Iterator[tuple[Part, Part]]:
    """Yield the query's and the key's parts that have together as many scores as are held at a time."""
    scores *= group
    rows = max(1, min(B, SCORES // (kv_heads * scores)))
    at_once = kv_heads if rows > 1 else max(1, min(kv_heads, SCORES // scores))
    for row in range(0, B, rows):
        for head in range(0, kv_heads, at_once):
            of_rows, end = slice(row, row + rows), min(head + at_once, kv_heads)
            yield (of_rows, slice(head * group, end * group)), (of_rows, slice(head, end))


def _like_activations(tensor: Tensor) -> Tensor:
    """Return an empty ``[B, heads, T, width]`` that lies in memory as ``[B, T, heads, width]``, as models have it."""
    B, heads, T, width = tensor.shape
    return tensor.new_empty(B, T, heads, width).transpose(1, 2)


def _in_two(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return numbers as the sum of two of a narrower type."""
    high = wide.to(dtype)
    return high, (wide - high).to(dtype)


def _with_columns(
    given: Tensor, group: int = 1, columns: tuple[Tensor, Tensor] | None = None, part: Part | None = None
) -> Tensor:
    """Return ``[B, heads, T, width]`` as ``[B * heads / group, group * T, width + 2]`` with two more columns.

    They are a part of ``columns``, or ones.
    """
    B, heads, T, width = given.shape
    joined = given.new_empty(B, heads, T, width + 2)
    joined[..., :width] = given
    if columns is None or part is None:
        joined[..., width:] = 1.0
    else:
        joined[..., width], joined[..., width + 1] = (column[part] for column in columns)
    return joined.view(B * heads // group, group * T, width + 2)


def _put(where: Tensor, product: Tensor, factor: float) -> None:
    """Write ``[B * heads, T, width + 2]`` without the last columns, times a factor, to ``[B, heads, T, width]``."""
    torch.mul(product.view(*where.shape[:3], -1)[..., : where.shape[3]], factor, out=where)
