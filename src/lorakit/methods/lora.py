"""LoRA: Low-Rank Adaptation of Large Language Models.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen; 2021, arXiv 2106.09685.

    h = W0 x + (alpha / rank) B A x,     A[rank, d_in], B[d_out, rank], B = 0 at the start   (eq. 3)

With ``scaling="rslora"`` the factor is ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv 2312.03732),
which keeps the size of the update's gradient independent of the rank.

Differences from the paper: A starts as in the authors' code (Kaiming uniform), not gaussian, unless
asked; a rank or an alpha can be set per layer by pattern; biases, where trained, are the adapter's
own copies and the base's stay untouched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor, nn

from lorakit.errors import ConfigError, ShapeError, TargetError, bullet_list, did_you_mean, quoted
from lorakit.inits import Init, find_init
from lorakit.inits.kaiming import Kaiming
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.method import AdapterParts, Method, Update


def _init_field(value: Any) -> Init:
    """Read the field ``init``; a wrong name is one problem among the others of the value."""
    try:
        return find_init(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


AnyInit = Annotated[
    Init, BeforeValidator(_init_field), PlainSerializer(lambda init: {"name": init.name, **init.model_dump()})
]
Rank = Annotated[int, Field(ge=1, strict=True)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LowRankUpdate(Update):
    """A pair ``A``, ``B``, and the adapter's own bias where it is trained."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: Tensor | None) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return ``scale * B A``, and the shift of the bias."""
        return Terms(self.A, self.B, self.scale, dropout=self.dropout, bias_shift=self.bias_shift(ops, layer))

    def bias_shift(self, ops: LayerOps, layer: nn.Module) -> Tensor | None:
        """Return the own bias less the base's, or None where it is not trained."""
        base = ops.bias(layer)
        if self.bias is None or base is None:
            return None
        return self.bias - base.detach().to(self.bias.dtype)

    def extra_repr(self) -> str:
        """Show rank and scale."""
        return f"rank={self.A.shape[-2]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRA(Method):
    """Plain LoRA and rsLoRA.

    >>> LoRA(rank=4, alpha=8).scale_at("model.layers.0.self_attn.q_proj")
    2.0
    >>> LoRA(rank=4, alpha=8, scaling="rslora", rank_pattern={"q_proj": 16}).scale_at("layers.0.q_proj")
    2.0

    Attributes:
        rank: columns of B and rows of A.
        alpha: strength; the factor is ``alpha / rank``, or ``alpha / sqrt(rank)`` with 'rslora'.
        dropout: probability with which A's input is dropped while training.
        scaling: 'standard' or 'rslora'.
        init: how A and B start.
        bias: which biases get a trained copy: 'none', 'lora_only' (the targets'), 'all' (every layer's).
        rank_pattern, alpha_pattern: other values for layers whose path is, or ends with ``.`` and, the
            key (a regular expression); the first key that matches counts.
    """

    name: ClassVar[str] = "lora"
    peft_tensors: ClassVar[Mapping[str, str]] = {"A": "lora_A", "B": "lora_B"}

    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: AnyInit = Kaiming()
    bias: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)

    def rank_at(self, path: str) -> int:
        """Return the rank for the layer at ``path``."""
        return int(matching_value(self.rank_pattern, path, self.rank))

    def scale_at(self, path: str, rank: int | None = None) -> float:
        """Return the factor on ``B A`` for the layer at ``path``, whose rank is ``rank`` if given."""
        rank = self.rank_at(path) if rank is None else rank
        alpha = float(matching_value(self.alpha_pattern, path, self.alpha))
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def build(
        self, model: nn.Module, sites: Sequence[Site], generator: torch.Generator, dtype: torch.dtype
    ) -> AdapterParts:
        """Make one pair per site, see :class:`Method`."""
        return AdapterParts({site.path: self.update_at(site, generator, dtype) for site in sites})

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> LowRankUpdate:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype)
        return LowRankUpdate(A, B, self.scale_at(site.path), self.dropout, bias)

    def start(self, site: Site, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the starting A, B and bias copy of one site, on its device."""
        device = site.ops.weight(site.layer).device
        A, B = self.init.draw(site, self.rank_at(site.path), generator)
        bias = site.ops.bias(site.layer) if self.bias != "none" else None
        own = None if bias is None else bias.detach().to(dtype, copy=True)
        return A.to(device, dtype), B.to(device, dtype), own

    def trained_biases(self) -> str:
        """Return the field ``bias``."""
        return self.bias

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse ranks above a layer's smaller side and patterns that match no site."""
        unmatched = [
            key
            for key in (*self.rank_pattern, *self.alpha_pattern)
            if not any(matching_value({key: True}, site.path, False) for site in sites)
        ]
        if unmatched:
            names = {site.path for site in sites} | {site.path.rsplit(".", 1)[-1] for site in sites}
            raise TargetError(
                bullet_list([f"pattern '{key}' matches no target.{did_you_mean(key, names)}" for key in unmatched])
            )
        deaf = [site.path for site in sites if self.dropout > 0 and not site.ops.takes_dropout]
        if deaf:
            raise ConfigError(
                f"dropout={self.dropout:g} cannot act on {quoted(deaf)}: these layers multiply by their weights "
                "themselves, so that an update has no input of its own. Use dropout=0, or exclude them."
            )
        problems = [
            f"rank {self.rank_at(site.path)} is above the smaller side of '{site.path}' ({site.d_out} x {site.d_in})"
            for site in sites
            if self.rank_at(site.path) > min(site.d_out, site.d_in)
        ]
        if problems:
            advice = "Lower the rank, set it for these layers with rank_pattern, or exclude them."
            raise ShapeError(f"{bullet_list(problems)}. {advice}")

    def to_peft(self) -> dict[str, Any]:
        """Return the fields of PEFT's ``LoraConfig``; newer ones only where they are not the default."""
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "init_lora_weights": True if self.init.peft is None else self.init.peft,
        }
        if self.scaling == "rslora":
            fields["use_rslora"] = True
        if self.rank_pattern:
            fields["rank_pattern"] = dict(self.rank_pattern)
        if self.alpha_pattern:
            fields["alpha_pattern"] = {key: _whole(value) for key, value in self.alpha_pattern.items()}
        return fields

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Read a ``LoraConfig`` without DoRA."""
        return cls(**lora_fields(config)) if is_lora(config) and not config.get("use_dora") else None


def is_lora(config: Mapping[str, Any]) -> bool:
    """Tell whether a PEFT config is of PEFT's type LORA (which includes DoRA)."""
    return str(config.get("peft_type", "")).upper() == "LORA"


def lora_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return LoRA's fields from PEFT's config; PEFT's defaults where it is silent."""
    init = config.get("init_lora_weights", True)
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout") or 0.0,
        "scaling": "rslora" if config.get("use_rslora") else "standard",
        "init": "gaussian" if init == "gaussian" else "kaiming",
        "bias": config.get("bias") or "none",
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }


def matching_value(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value of the first key that matches ``path`` as PEFT matches, or ``default``.

    A key may leave out the part of a fused projection: 'c_attn' means 'c_attn[q]' too.
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})(\[.*\])?$", path):
            return value
    return default


def _whole(value: float) -> int | float:
    """Write 16.0 as 16, which older PEFT versions expect."""
    return int(value) if float(value).is_integer() else value
