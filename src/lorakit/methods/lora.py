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
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from lorakit.errors import ConfigError, ShapeError, TargetError, bullet_list, did_you_mean, quoted
from lorakit.inits import Calibration, Init, find_init
from lorakit.inits.inputs import input_refusal
from lorakit.inits.kaiming import Kaiming
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.blank import Blank, BlankShifted
from lorakit.methods.method import AdapterParts, Calibrated, Method, Update, copy_strictly
from lorakit.methods.patterns import at_sites, matching_value, whole
from lorakit.methods.ranks import with_chosen_ranks, with_even_ranks
from lorakit.methods.rule import Rule


def _init_field(value: Any) -> Init:
    """Read the field ``init``; a wrong name is one problem among the others of the value."""
    try:
        return find_init(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _rank_field(value: Any) -> Any:
    """Read the field ``rank``."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError("give a whole number of at least 1, or 'auto'")
    return value


AnyInit = Annotated[
    Init, BeforeValidator(_init_field), PlainSerializer(lambda init: {"name": init.name, **init.model_dump()})
]
Rank = Annotated[int, Field(ge=1, strict=True)]
RankOrNone = Annotated[int, Field(ge=0, strict=True)]
RankOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_rank_field)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LowRankUpdate(Update):
    """A pair ``A``, ``B``, and the adapter's own bias where it is trained.

    Where the pair starts with ``B A != 0`` and the function is to stay, the update is
    ``scale (B A - B0 A0)`` with the frozen start ``A0``, ``B0``. The parameters are then the differences from it,

        B A - B0 A0 = B_d (A0 + A_d) + B0 A_d           A_d = A - A0,  B_d = B - B0

    which is a pair of rank 2r that is zero at the start to the last bit and keeps small steps in any dtype; weight
    decay draws it to the base and not away from it. It is saved in this form, as a plain pair.

    Attributes:
        A, B: the trained factors; their differences from the start where there is an offset.
        A0, B0: the frozen start, or None.
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self, A: Tensor, B: Tensor, scale: float, dropout: float, bias: Tensor | None, offset: bool = False
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros_like(A) if offset else A)
        self.B = nn.Parameter(torch.zeros_like(B) if offset else B)
        self.register_buffer("A0", A if offset else None, persistent=False)
        self.register_buffer("B0", B if offset else None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.scale = scale
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the pair that acts: ``A[rank, d_in]``, ``B[d_out, rank]``, of twice the rank with an offset."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A0 + self.A, self.A], dim=-2), torch.cat([self.B, self.B0], dim=-1)

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return ``scale * B A``, and the shift of the bias."""
        A, B = self.factors()
        return Terms(A, B, self.scale, dropout=self.dropout, bias_shift=self.bias_shift(ops, layer))

    def bias_shift(self, ops: LayerOps, layer: nn.Module) -> Tensor | None:
        """Return the own bias less the base's, or None where it is not trained."""
        base = ops.bias(layer)
        if self.bias is None or base is None:
            return None
        return self.bias - base.detach().to(self.bias.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the pair that acts, and what else is trained."""
        A, B = self.factors()
        return {**super().tensors(), "A": A, "B": B}

    @torch.no_grad()
    def load(self, given: Mapping[str, Tensor]) -> list[str]:
        """Take a saved pair; with an offset it is taken apart, an ``A0`` that is not here already to rounding."""
        if self.A0 is None or self.B0 is None:
            return super().load(given)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if {name: tuple(tensor.shape) for name, tensor in given.items()} != wanted:
            return copy_strictly(self.tensors(), given)  # says what differs
        rank = self.A.shape[-2]
        A, B = given["A"].to(self.A), given["B"].to(self.B)
        start, change = A[..., :rank, :], A[..., rank:, :]
        # A0 + A_d was rounded: where the A0 that is here gives the saved sum, it is the one that was saved.
        self.A0.copy_(torch.where(self.A0 + change == start, self.A0, start - change))
        self.A.copy_(change)
        self.B.copy_(B[..., :, :rank])
        self.B0.copy_(B[..., :, rank:])
        beside = {name: tensor for name, tensor in given.items() if name not in ("A", "B")}
        return copy_strictly({name: tensor for name, tensor in self.tensors().items() if name in beside}, beside)

    def extra_repr(self) -> str:
        """Show rank and scale."""
        return f"rank={self.A.shape[-2]}, scale={self.scale:g}, dropout={self.dropout:g}"


class LowRankRule(Rule):
    """What training a pair with an offset must remember: its start, to the last bit."""

    def state(self) -> dict[str, Tensor]:
        """Return the frozen starts."""
        return {f"{path}/A0": update.A0 for path, update in self._shifted() if update.A0 is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the frozen starts."""
        for path, update in self._shifted():
            if update.A0 is not None:
                update.A0.copy_(tensors[f"{path}/A0"])

    def _shifted(self) -> Iterator[tuple[str, LowRankUpdate]]:
        for path, update in self.updates.items():
            if isinstance(update, LowRankUpdate) and update.A0 is not None:
                yield path, update


class LoRA(Method):
    """Plain LoRA and rsLoRA.

    >>> LoRA(rank=4, alpha=8).scale_at("model.layers.0.self_attn.q_proj")
    2.0
    >>> LoRA(rank=4, alpha=8, scaling="rslora", rank_pattern={"q_proj": 16}).scale_at("layers.0.q_proj")
    2.0

    Attributes:
        rank: columns of B and rows of A; 'auto' lets the examples choose, see ``budget``.
        alpha: strength; the factor is ``alpha / rank``, or ``alpha / sqrt(rank)`` with 'rslora'.
        dropout: probability with which A's input is dropped while training.
        scaling: 'standard' or 'rslora'.
        init: how A and B start.
        bias: which biases get a trained copy: 'none', 'lora_only' (the targets'), 'all' (every layer's).
        rank_pattern, alpha_pattern: other values for layers whose path is, or ends with ``.`` and, the
            key (a regular expression); the first key that matches counts. Rank 0 leaves a layer as it is.
        budget: with ``rank='auto'``, how many numbers the pairs may have together; the ranks are then chosen layer
            by layer from examples, and every layer gets the factor that ``alpha`` means at their mean.
        rank_by: what is weighed for it: the layers' 'gradient', or the variance of their 'inputs'.
    """

    name: ClassVar[str] = "lora"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rslora": {"scaling": "rslora"}}
    peft_tensors: ClassVar[Mapping[str, str]] = {"A": "lora_A", "B": "lora_B"}

    rank: RankOrAuto = 8
    alpha: Alpha = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scaling: Literal["standard", "rslora"] = "standard"
    init: AnyInit = Kaiming()
    bias: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: dict[str, RankOrNone] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    budget: Annotated[int, Field(ge=1, strict=True)] | None = None
    rank_by: Literal["gradient", "inputs"] = "gradient"

    @model_validator(mode="after")
    def _budget_and_rank(self) -> Self:
        if (self.rank == "auto") != (self.budget is not None):
            raise ValueError("rank='auto' and budget (how many numbers the pairs may have together) go together")
        if self.rank == "auto" and self.rank_pattern:
            raise ValueError("rank='auto' chooses every rank: leave rank_pattern out")
        return self

    def rank_at(self, path: str) -> int:
        """Return the rank for the layer at ``path``; 0 leaves it as it is.

        Raises:
            ConfigError: the ranks have not been chosen yet.
        """
        rank = matching_value(self.rank_pattern, path, self.rank)
        if rank == "auto":
            raise ConfigError("rank='auto' is chosen when the adapter is attached, from examples.")
        return int(rank)

    def scale_at(self, path: str, rank: int | None = None) -> float:
        """Return the factor on ``B A`` for the layer at ``path``, whose rank is ``rank`` if given."""
        rank = self.rank_at(path) if rank is None else rank
        alpha = float(matching_value(self.alpha_pattern, path, self.alpha))
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def looks(self) -> str | None:
        """Return why examples are needed: the ranks, or the start."""
        if self.rank == "auto":
            return f"rank='auto' weighs the layers' {'gradients' if self.rank_by == 'gradient' else 'inputs'}"
        needed = self.init.looks()
        return None if needed is None else f"init '{self.init.name}' looks at {needed}"

    def calibrate(
        self, model: nn.Module, sites: Sequence[Site], calibration: Calibration, generator: torch.Generator
    ) -> Calibrated:
        """Choose the ranks where they are to be chosen, and look at what the start needs."""
        method: LoRA = self
        if self.rank == "auto":
            method = with_chosen_ranks(self, model, sites, calibration, generator)
        ranks = {site.path: rank for site in sites if (rank := method.rank_at(site.path)) > 0}
        acting = [site for site in sites if site.path in ranks]
        if method.init.looks() is None:
            return Calibrated(method)
        scales = {path: method.scale_at(path) for path in ranks}
        return Calibrated(method, method.init.look(model, acting, ranks, scales, calibration, generator))

    def uncalibrated(self, sites: Sequence[Site]) -> LoRA:
        """Return the same with a blank start, and even ranks where they are to be chosen."""
        method = with_even_ranks(self, sites) if self.rank == "auto" else self
        blank: LoRA = method.replaced(init=BlankShifted() if self.init.shifts else Blank())
        return blank

    def changes_start(self) -> bool:
        """Tell whether the init changes the outputs."""
        return self.init.changes_start

    def refusal(self, site: Site) -> str | None:
        """Return why the init cannot start on a site, or why its inputs cannot be weighed."""
        by_inputs = self.rank == "auto" and self.rank_by == "inputs"
        return self.init.refusal(site) or (input_refusal(site) if by_inputs else None)

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return the rule that remembers frozen starts."""
        return LowRankRule(updates, num_steps)

    def finished(self, updates: Mapping[str, Update]) -> Method:
        """Return the method with ranks and scales as saved: a pair with an offset is a plain one of twice the rank.

        Patterns for layers that were left alone are not saved.
        """
        if not self.init.shifts and 0 not in self.rank_pattern.values():
            return self
        wanted = {
            path: (int(update.tensors()["A"].shape[-2]), update.scale)
            for path, update in updates.items()
            if isinstance(update, LowRankUpdate)
        }
        anew: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}} if 0 in self.rank_pattern.values() else {}
        return at_sites(self.replaced(init=Kaiming() if self.init.shifts else self.init, **anew), wanted)

    def build(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> AdapterParts:
        """Make one pair per site whose rank is not 0, see :class:`Method`."""
        return AdapterParts(
            {
                site.path: self.update_at(site, generator, dtype, seen.get(site.path))
                for site in sites
                if self.rank_at(site.path) > 0
            }
        )

    def update_at(self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None) -> LowRankUpdate:
        """Make the update of one site."""
        A, B, bias = self.start(site, generator, dtype, seen)
        return LowRankUpdate(A, B, self.scale_at(site.path), self.dropout, bias, self.init.shifts)

    def start(
        self, site: Site, generator: torch.Generator, dtype: torch.dtype, seen: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the starting A, B and bias copy of one site, on its device."""
        device = site.ops.weight(site.layer).device
        A, B = self.init.draw(site, self.rank_at(site.path), self.scale_at(site.path), generator, seen)
        bias = site.ops.bias(site.layer) if self.bias != "none" else None
        own = None if bias is None else bias.detach().to(dtype, copy=True)
        return A.to(device, dtype), B.to(device, dtype), own

    def trained_biases(self) -> str:
        """Return the field ``bias``."""
        return self.bias

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse ranks above a layer's smaller side and patterns that match no site."""
        super().check(sites)
        _check_patterns((*self.rank_pattern, *self.alpha_pattern), sites)
        deaf = [site.path for site in sites if self.dropout > 0 and not site.ops.takes_dropout]
        if deaf:
            raise ConfigError(
                f"dropout={self.dropout:g} cannot act on {quoted(deaf)}: these layers multiply by their weights "
                "themselves, so that an update has no input of its own. Use dropout=0, or exclude them."
            )
        problems = [
            f"rank {self.rank_at(site.path)} is above the smaller side of '{site.path}' ({site.d_out} x {site.d_in})"
            for site in sites
            if self.rank != "auto" and self.rank_at(site.path) > min(site.d_out, site.d_in)
        ]
        if problems:
            advice = "Lower the rank, set it for these layers with rank_pattern, or exclude them."
            raise ShapeError(f"{bullet_list(problems)}. {advice}")

    def to_peft(self) -> dict[str, Any]:
        """Return the fields of PEFT's ``LoraConfig``; newer ones only where they are not the default."""
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "init_lora_weights": True if self.init.peft is None else self.init.peft,
        }
        if self.scaling == "rslora":
            fields["use_rslora"] = True
        if self.rank_pattern:
            fields["rank_pattern"] = dict(self.rank_pattern)
        if self.alpha_pattern:
            fields["alpha_pattern"] = {key: whole(value) for key, value in self.alpha_pattern.items()}
        return fields

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Read a ``LoraConfig`` without DoRA."""
        plain = cls is LoRA and is_lora(config) and not config.get("use_dora")
        return cls(**lora_fields(config)) if plain else None


def _check_patterns(patterns: Sequence[str], sites: Sequence[Site]) -> None:
    unmatched = [k for k in patterns if not any(matching_value({k: True}, site.path, False) for site in sites)]
    if unmatched:
        names = {site.path for site in sites} | {site.path.rsplit(".", 1)[-1] for site in sites}
        raise TargetError(
            bullet_list([f"pattern '{key}' matches no target.{did_you_mean(key, names)}" for key in unmatched])
        )


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
