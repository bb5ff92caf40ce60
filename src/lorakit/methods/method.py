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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.errors import ConfigError, did_you_mean
from lorakit.layers import LayerOps, Site, Terms
from lorakit.settings import Settings


class Update(nn.Module, ABC):
    """One site's trainable update: parameters, and the :class:`Terms` they stand for."""

    @abstractmethod
    def terms(self, ops: LayerOps, layer: nn.Module) -> Terms:
        """Return the update as it is now, differentiable in the parameters."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what a saved adapter keeps of this site, by name."""
        return dict(self.named_parameters(recurse=False))


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


class Method(Settings):
    """A way to fine-tune, with its settings.

    Attributes:
        name: how configs and the command line call it.
        peft_tensors: how PEFT names this method's tensors on a plain linear layer.
    """

    name: ClassVar[str]
    peft_tensors: ClassVar[Mapping[str, str]] = {}

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse sites that the method cannot start on, all by name, before anything is built.

        Raises:
            ShapeError: a rank above a site's smaller side.
        """

    @abstractmethod
    def build(
        self, model: nn.Module, sites: Sequence[Site], generator: torch.Generator, dtype: torch.dtype
    ) -> AdapterParts:
        """Make the updates for ``sites``, on each site's device, in ``dtype``.

        Args:
            model: the base, for parts that act on it as a whole.
            sites: where to act; a method without sites gets an empty list.
            generator: a CPU generator; all randomness comes from it.
            dtype: dtype of the adapter's parameters.
        """

    def needs_sites(self) -> bool:
        """Tell whether the method acts on layers (soft prompts do not)."""
        return True

    def modules_in_full(self, model: nn.Module) -> list[str]:
        """Return modules that the method trains in full, as ``train_modules`` names them."""
        return []

    def trained_biases(self) -> str:
        """Return which biases get a trained copy: 'none', 'lora_only' (the targets') or 'all'."""
        return "none"

    def param_groups(self, named: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Split the adapter's parameters into optimizer groups; by default one, at ``lr``."""
        return [{"params": list(named.values()), "lr": lr}]

    def before_step(self, updates: Mapping[str, Update], step: int) -> None:
        """Act on the gradients before the optimizer's step."""

    def after_step(self, updates: Mapping[str, Update], step: int) -> None:
        """Act on the updates after the optimizer's step."""

    def training_state(self, updates: Mapping[str, Update]) -> dict[str, Tensor]:
        """Return what training must remember beside the adapter's tensors, by name, for a checkpoint."""
        return {}

    def load_training_state(self, updates: Mapping[str, Update], tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`training_state` returned; the adapter has its tensors by then."""

    def penalty(self, updates: Mapping[str, Update]) -> Tensor | None:
        """Return a term to add to the loss, or None."""
        return None

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


def find_method(value: str | Mapping[str, Any] | Method, **fields: Any) -> Method:
    """Return a method from its name and fields, or from what ``summary`` returned.

    Raises:
        ConfigError: no method has this name, or a field is wrong.
    """
    if isinstance(value, Method):
        return value.replaced(**fields) if fields else value
    given = {"name": value} if isinstance(value, str) else dict(value)
    name = str(given.pop("name", ""))
    by_lower = {known.lower(): known for known in method_names()}
    if name.lower() not in by_lower:
        known = ", ".join(method_names())
        raise ConfigError(f"no method '{name}'.{did_you_mean(name, method_names())} Known: {known}.")
    return _registry()[by_lower[name.lower()]](**{**given, **fields})
