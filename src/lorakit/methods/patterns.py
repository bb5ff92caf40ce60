"""Ranks and scales by layer: patterns over paths, found as PEFT finds them, and written so that it finds them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.methods.lora import LoRA

SCALE_TOLERANCE = 1e-12
"""Of two scales that are the same number, computed in another order."""


def matching_value(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first key that matches ``path`` as PEFT matches, or ``default``.

    A key may leave out the part of a fused projection: 'c_attn' means 'c_attn[q]' too.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})(\[.*\])?$", path):
            return value
    return default


def at_sites(method: LoRA, wanted: Mapping[str, tuple[int, float]]) -> LoRA:
    """Return the method, with other patterns where it does not say these ranks and scales at these sites."""
    if all(
        method.rank_at(path) == rank and math.isclose(method.scale_at(path, rank), scale, rel_tol=SCALE_TOLERANCE)
        for path, (rank, scale) in wanted.items()
    ):
        return method
    fields = ranks_and_alphas(method, wanted)
    patterns = {name: fields[name] for name in ("rank_pattern", "alpha_pattern")}
    changed: LoRA = method.replaced(rank=fields["r"], alpha=fields["lora_alpha"], **patterns)
    return changed


def ranks_and_alphas(method: LoRA, wanted: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return ``r``, ``lora_alpha`` and patterns that PEFT reads as these ranks and scales."""
    root = math.sqrt if method.scaling == "rslora" else float
    ranks = {path: rank for path, (rank, _) in wanted.items()}
    alphas = {path: whole(scale * root(rank)) for path, (rank, scale) in wanted.items()}

    def same_scale(path: str, alpha: float) -> bool:
        rank, scale = wanted[path]
        return math.isclose(alpha / root(rank), scale, rel_tol=SCALE_TOLERANCE)

    rank, rank_pattern = _pattern(method.rank_pattern, method.rank, ranks, lambda path, rank: rank == ranks[path])
    alpha, alpha_pattern = _pattern(method.alpha_pattern, method.alpha, alphas, same_scale)
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _pattern(
    given: Mapping[str, Any], default: Any, wanted: Mapping[str, Any], fits: Callable[[str, Any], bool]
) -> tuple[Any, dict[str, Any]]:
    """Return a default and a pattern that PEFT reads as ``wanted``: the given ones if it does.

    Else a default for all where they are one value, or a pattern by exact paths. The order of keys counts
    for PEFT, and sorting the file's keys changes it.
    """
    values = list(wanted.values())
    differing = {path: value for path, value in wanted.items() if not fits(path, default)}
    by_path = {re.escape(path): value for path, value in differing.items()}
    anchored = {f"^{key}": value for key, value in by_path.items()}
    uniform = bool(values) and all(fits(path, values[0]) for path in wanted)
    candidates: list[tuple[Any, Mapping[str, Any]]] = [(default, given)]
    candidates += [(values[0], {})] if uniform else [(default, by_path)]
    for start, pattern in candidates:
        ordered = dict(sorted(pattern.items()))
        if all(fits(path, matching_value(ordered, path, start)) for path in wanted):
            return start, ordered
    return default, dict(sorted(anchored.items()))


def whole(value: float) -> int | float:
    """Write 16.0, also where rounding left a trace, as 16: older PEFT versions expect an integer."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value
