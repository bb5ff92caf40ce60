"""``Attachments``: adding adapters to a model and removing them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.adapters import attached, capture, token_rows
from lorakit.adapters.attached import Attached
from lorakit.adapters.beginning import begin
from lorakit.adapters.blocks import Layers
from lorakit.adapters.branches import Active
from lorakit.adapters.checkpointing import InputGradients
from lorakit.adapters.host import keep_statistics, leave_fast_paths, restore
from lorakit.adapters.identity import Identity, identify
from lorakit.adapters.state import AdapterState
from lorakit.adapters.targets import as_entries, find_full_modules, find_sites, shortest_names
from lorakit.adapters.walk import walk_parameters
from lorakit.errors import AdapterError, bullet_list, did_you_mean
from lorakit.inits import Calibration
from lorakit.layers import Site
from lorakit.methods import AdapterParts, Method, find_method


class Attachments(ABC):
    """What adapters a model has.

    Attributes:
        model: the adapted model.
        adapters: what each adapter has put into it, by name.
        active: which adapters act now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, Attached] = {}
        self.active = Active()
        self._flags = attached.freeze_base(model)
        keep_statistics(model)
        leave_fast_paths(model, self.active)
        self._input_gradients = InputGradients(model)
        model.__dict__["_lorakit_handle"] = self

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order they came."""
        return list(self.adapters)

    @abstractmethod
    def use(self, which: str | Sequence[str] | Mapping[str, float] | None) -> None:
        """Choose what acts on every row."""

    @abstractmethod
    def refuse_merged(self, what: str) -> None:
        """Raise where adapters are merged now."""

    def add(
        self,
        name: str,
        method: Method | str | Mapping[str, Any] = "lora",
        targets: str | Iterable[str] = "all-linear",
        *,
        exclude: str | Iterable[str] | None = None,
        layers: Layers | None = None,
        train_modules: str | Iterable[str] = (),
        new_modules: Sequence[str] = (),
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        calibration: Calibration | None = None,
        blank: bool = False,
    ) -> Attached:
        """Add an adapter and make it the only one that acts. See :func:`lorakit.attach` for the arguments."""
        self._check_new(name)
        method = find_method(method)
        named = [*as_entries(train_modules), *method.modules_in_full(self.model)]
        whole, parts_of = token_rows.parted(named)
        full = find_full_modules(self.model, whole)
        leaves = attached.plan_copies(self.model, full)
        sites = find_sites(self.model, targets, exclude, layers, skip=full) if method.needs_sites() else []
        rows = token_rows.find_rows(self.model, parts_of, full, sites)
        method.check(sites)
        method, parts = begin(self.model, self.active, method, sites, calibration, seed, dtype, blank)
        sites = [site for site in sites if site.path in parts.updates]
        biases = attached.plan_biases(self.model, sites, method.trained_biases(), full)
        entry = Attached(
            method=method,
            sites={site.path: (site.host, site.place) for site in sites},
            biases=biases,
            rows=rows,
            copies=tuple(leaves),
            full_modules=tuple(full),
            new_modules=tuple(new_modules),
            targets=tuple(shortest_names(self.model, [site.path for site in sites], full)),
            dtype=dtype,
        )
        self._install(name, entry, sites, leaves, parts)
        self.use(name)
        return entry

    def add_state(self, state: AdapterState, name: str = "default", *, trainable: bool = False) -> Attached:
        """Add a saved adapter, its tensors bit for bit, and make it the only one that acts.

        Raises:
            TargetError: the model lacks one of its layers.
            ShapeError: a tensor does not fit its layer.
            ConfigError: it is to be trained on, and its method cannot act on one of its layers.
        """
        self._check_new(name)
        sites, leaves, biases = capture.places(self.model, state)
        if trainable:
            state.method.check(sites)
        entry = Attached(
            method=state.method,
            sites={site.path: (site.host, site.place) for site in sites},
            biases=biases,
            rows=token_rows.saved_rows(self.model, state),
            copies=tuple(leaves),
            full_modules=state.full_modules,
            new_modules=() if state.identity is None else state.identity.excluded,
            targets=tuple(state.targets),
            dtype=capture.dtype_of(state),
        )
        _, parts = begin(self.model, self.active, state.method, sites, None, 0, entry.dtype, blank=True)
        self._install(name, entry, sites, leaves, parts)
        try:
            capture.fill(self, name, state)
        except BaseException:  # the model must not keep half an adapter
            self.remove(name)
            raise
        self.trainable(name, trainable)
        self.use(name)
        return entry

    def set_state(self, state: AdapterState, name: str | None = None) -> None:
        """Give an attached adapter the tensors of ``state``, bit for bit; they must fit."""
        self.known([name := self.one(name)])
        capture.fill(self, name, state)

    def remove(self, name: str) -> None:
        """Remove one adapter; a layer without any is of its own class again."""
        entry = self.entry(name)
        self.refuse_merged("remove an adapter")
        attached.uninstall(self.model, name, entry)
        del self.adapters[name]
        self.active.weights.pop(name, None)
        self.active.strengths.pop(name, None)

    def detach(self) -> nn.Module:
        """Remove every adapter; classes, keys, flags and outputs are exactly as before attaching."""
        self.refuse_merged("detach (or keep the merged weights with bake())")
        for name in list(self.adapters):
            self.remove(name)
        for module in self.model.modules():
            restore(module)
        for name, parameter in walk_parameters(self.model):
            parameter.requires_grad_(self._flags.get(name, False))
        self._input_gradients.remove()
        del self.model.__dict__["_lorakit_handle"]
        return self.model

    def parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters by ``path.tensor``, tied copies once."""
        return attached.parameters_of(self.model, self.one(name), self.entry(self.one(name)))

    def trainable(self, name: str, trainable: bool = True) -> None:
        """Make an adapter's parameters require gradients, or not."""
        for parameter in self.parameters(name).values():
            parameter.requires_grad_(trainable)

    def identity(self, name: str | None = None) -> Identity:
        """Return the base's identity without the modules that this adapter trains in full."""
        return identify(self.model, exclude=attached.not_the_bases(self.model, self.entry(self.one(name))))

    def entry(self, name: str) -> Attached:
        """Return what the adapter ``name`` has put into the model.

        Raises:
            AdapterError: there is none of this name.
        """
        self.known([name])
        return self.adapters[name]

    def known(self, names: Iterable[str]) -> None:
        """Raise an AdapterError that lists every name which no adapter has."""
        wrong = [f"no adapter '{n}'.{did_you_mean(n, self.names)}" for n in names if n not in self.adapters]
        if wrong:
            raise AdapterError(f"{bullet_list(wrong)} Attached: {', '.join(self.names) or 'none'}.")

    def one(self, name: str | None) -> str:
        """Return ``name``, or the only adapter that could be meant: the one that acts, or the only one.

        Raises:
            AdapterError: several could be meant.
        """
        if name is not None:
            return name
        acting = list(self.active.weights)
        if len(choice := acting if len(acting) == 1 else self.names) != 1:
            raise AdapterError(f"say which adapter: {', '.join(self.names) or 'none is attached'}.")
        return choice[0]

    def _check_new(self, name: str) -> None:
        self.refuse_merged("add an adapter")
        if not name or "." in name:
            raise AdapterError(f"adapter name '{name}': use a name that is not empty and has no dot.")
        if name in self.adapters:
            raise AdapterError(
                f"an adapter '{name}' is attached already. Choose another name, or remove('{name}') first."
            )

    def _install(
        self, name: str, entry: Attached, sites: Sequence[Site], leaves: Mapping[str, nn.Module], parts: AdapterParts
    ) -> None:
        entry.parts.update(parts.parts)
        try:
            attached.install_updates(self.model, name, self.active, sites, parts.updates)
            attached.install_biases(self.model, name, self.active, entry.biases, entry.dtype)
            token_rows.install_rows(self.model, name, self.active, entry.rows, entry.dtype)
            attached.install_copies(self.model, name, self.active, leaves, entry.dtype)
            attached.install_parts(self.model, name, self.active, entry)
        except BaseException:  # the model must not keep half an adapter
            attached.uninstall(self.model, name, entry)
            raise
        self.adapters[name] = entry
