"""``Method``: the contract of a fine-tuning method, and how one is found by name.

A method is a frozen value (its own config) that builds trainable updates for sites. It speaks
matrices only; it never sees what kind of layer a site is. A new method is one file here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.errors import ConfigError, UnsupportedLayerError, bullet_list, did_you_mean, quoted
from lorakit.inits.calibration import Calibration
from lorakit.layers import LayerOps, Site, Terms
from lorakit.methods.rule import Rule
from lorakit.settings import Settings


class Update(nn.Module, ABC):
    """One site's trainable update: parameters, and the :class:`Terms` they stand for.

    Attributes:
        scales_rows: whether its terms have a ``row_scale``.
    """

    scales_rows: ClassVar[bool] = False

    @abstractmethod
    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the update as it is now, differentiable in the parameters."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved adapter keeps of this site, by name; nothing of an update that does nothing."""
        return dict(self.named_parameters(recurse=False))

    def load(self, given: Mapping[str, Tensor]) -> list[str]:
        """Take the tensors of a saved adapter, bit for bit; return what is wrong with them.

        An update whose saved form is plainer than its own takes that form apart again.
        """
        return copy_strictly(self.tensors(), given)


class BiasUpdate(Update):
    """The adapter's own copy of a layer's bias, and nothing else."""

    def __init__(self, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().to(dtype, copy=True))

    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return a shift of the bias: the own copy less the base's."""
        base = ops.bias(layer)
        assert base is not None
        return Terms(A=None, B=None, bias_shift=self.bias - base.detach().to(self.bias.dtype))


@torch.no_grad()
def copy_strictly(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Copy ``given`` into ``own`` where names and shapes agree, and return every disagreement."""
    problems = []
    for key in sorted({*own, *given}):
        if key not in given:
            problems.append(f"the adapter has no tensor '{key}'")
        elif key not in own:
            problems.append(f"tensor '{key}' has no place here")
        elif own[key].shape != given[key].shape:
            found, expected = tuple(given[key].shape), tuple(own[key].shape)
            problems.append(f"tensor '{key}' is {found} in the adapter, {expected} here")
        else:
            own[key].copy_(given[key])
    return problems


@dataclass
class Selection:
    """Which adapters act, and how strongly; one object is shared by all sites of a model.

    Attributes:
        weights: strength by adapter name; an adapter that is not here does not act.
        version: counts changes, for whoever caches what follows from them.
    """

    weights: dict[str, float] = field(default_factory=dict)

    def strength(self, name: str) -> float:
        """Return the adapter's strength, 0.0 where it does not act."""
        return self.weights.get(name, 0.0)


class ModelPart(nn.Module, ABC):
    """What a method adds to the model as a whole and not to a layer, such as a soft prompt.

    Its parameters belong to the adapter; it acts through hooks that ask :meth:`strength` each time.
    """

    name: str
    selection: Selection

    def bind(self, name: str, selection: Selection) -> None:
        """Tell the part which adapter it belongs to."""
        self.name, self.selection = name, selection

    def strength(self) -> float:
        """Return the adapter's strength now, 0.0 while it does not act."""
        return self.selection.strength(self.name)

    @abstractmethod
    def install(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Register hooks (bound methods of this part) on the model and return their handles."""


@dataclass(frozen=True)
class AdapterParts:
    """What ``Method.build`` returns: updates by path, and parts of the model as a whole by name."""

    updates: Mapping[str, Update]
    parts: Mapping[str, ModelPart] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated:
    """What ``Method.calibrate`` returns: the method with everything decided, and what it saw, by path."""

    method: Method
    seen: Mapping[str, Any] = field(default_factory=dict)


class Method(Settings):
    """A way to fine-tune, with its settings.

    Attributes:
        name: how configs and the command line call it.
        aliases: other names, with the fields that each of them means; a class derived from this one does not have them.
        peft_tensors: how PEFT names this method's tensors on a plain linear layer.
    """

    name: ClassVar[str]
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    peft_tensors: ClassVar[Mapping[str, str]] = {}

    def refusal(self, site: Site) -> str | None:
        """Return why the method cannot act on a site, or None where it can."""
        return None

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse sites that the method cannot start on, all by name, before anything is built.

        Raises:
            UnsupportedLayerError: sites on which it cannot act, see :meth:`refusal`.
            ShapeError: a rank above a site's smaller side.
        """
        refused: dict[str, list[str]] = {}
        for site in sites:
            if (why := self.refusal(site)) is not None:
                refused.setdefault(why, []).append(site.path)
        if refused:
            lines = [f"{quoted(paths)}: {why}" for why, paths in refused.items()]
            raise UnsupportedLayerError(
                f"method '{self.name}' cannot act on every target: {bullet_list(lines)}. Exclude these, or take "
                "another method."
            )

    def looks(self) -> str | None:
        """Return why the method must look at the model on examples before it starts, or None where it need not."""
        return None

    def calibrate(
        self, model: nn.Module, sites: Sequence[Site], calibration: Calibration, generator: torch.Generator
    ) -> Calibrated:
        """Look at the model on examples and return what to build with; called where :meth:`looks` says so.

        Raises:
            DataError: the examples do not suffice.
        """
        return Calibrated(self)

    def uncalibrated(self, sites: Sequence[Site]) -> Method:
        """Return a method with as many numbers on these sites that starts without drawing or looking.

        For tensors that are loaded over it, and for simulating a run.
        """
        return self

    @abstractmethod
    def build(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, Any] = MappingProxyType({}),
    ) -> AdapterParts:
        """Make the updates for ``sites``, on each site's device, in ``dtype``.

        Args:
            model: the base, for parts that act on it as a whole.
            sites: where to act; a method without sites gets an empty list. A site without an update is left alone.
            generator: a CPU generator; all randomness comes from it.
            dtype: dtype of the adapter's parameters.
            seen: what :meth:`calibrate` saw, by path.
        """

    def changes_start(self) -> bool:
        """Tell whether the model's outputs are others as soon as the adapter is attached."""
        return False

    def needs_sites(self) -> bool:
        """Tell whether the method acts on layers (soft prompts do not)."""
        return True

    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return modules that the method trains in full, as ``train_modules`` names them."""
        return []

    def trained_biases(self) -> str:
        """Return which biases get a trained copy: 'none', 'lora_only' (the targets') or 'all'."""
        return "none"

    def rule(self, updates: Mapping[str, Update], num_steps: int) -> Rule:
        """Return what this method does while the adapter with these updates trains for ``num_steps`` steps."""
        return Rule(updates, num_steps)

    def finished(self, updates: Mapping[str, Update]) -> Method:
        """Return the method that a saved adapter with these updates is of; where it differs, it is plainer."""
        return self

    def to_peft(self) -> dict[str, Any] | None:
        """Return the method's fields as PEFT's ``adapter_config.json`` spells them; None where it cannot."""
        return None

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Return the method that a PEFT config describes; None where it is another method's."""
        return None

    def summary(self) -> dict[str, Any]:
        """Return name and fields as JSON values; ``find_method`` reads it back."""
        return {"name": self.name, **self.model_dump(mode="json")}


@functools.cache
def _registry() -> dict[str, type[Method]]:
    import lorakit.methods as package

    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__, "lorakit.methods."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and issubclass(kind, Method) and not inspect.isabstract(kind):
                found[kind.name] = kind
    return found


def method_names() -> list[str]:
    """Return the names of all methods."""
    return sorted(_registry())


def method_types() -> tuple[type[Method], ...]:
    """Return all methods' types, sorted by name."""
    return tuple(_registry()[name] for name in method_names())


def aliases_of(kind: type[Method]) -> Mapping[str, Mapping[str, Any]]:
    """Return a method's other names, with the fields that each means; not those of what it is derived from."""
    found: Mapping[str, Mapping[str, Any]] = vars(kind).get("aliases", {})
    return found


def type_named(name: str) -> tuple[type[Method], Mapping[str, Any]]:
    """Return the method of a name or an alias, in whatever case, and the fields that the alias means.

    Raises:
        ConfigError: no method is called so.
    """
    called: dict[str, tuple[type[Method], Mapping[str, Any]]] = {}
    for kind in method_types():
        called |= {alias.lower(): (kind, fields) for alias, fields in aliases_of(kind).items()}
    called |= {kind.name.lower(): (kind, {}) for kind in method_types()}
    if name.lower() not in called:
        known = sorted({*method_names(), *(alias for kind in method_types() for alias in aliases_of(kind))})
        raise ConfigError(f"no method '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return called[name.lower()]


def find_method(value: str | Mapping[str, Any] | Method, **fields: Any) -> Method:
    """Return a method from its name (or an alias) and fields, or from what ``summary`` returned.

    Raises:
        ConfigError: no method has this name, or a field is wrong, or is another than the alias means.
    """
    if isinstance(value, Method):
        return value.replaced(**fields) if fields else value
    given = {**({"name": value} if isinstance(value, str) else value), **fields}
    name = str(given.pop("name", ""))
    kind, meant = type_named(name)
    wrong = [
        f"'{name}' means {key}={meant[key]!r}, not {given[key]!r}"
        for key in meant
        if given.get(key, meant[key]) != meant[key]
    ]
    if wrong:
        raise ConfigError(f"{bullet_list(wrong)}. Leave the field out, or name the method '{kind.name}'.")
    return kind(**{**given, **meant})
