"""``Handle``: the one object through which adapters on a model are added, chosen, merged and removed.

    handle = attach(model, LoRA(rank=8), targets="all-linear")
    ...train the model as usual...
    with handle.disabled():
        model(x)              # the untouched base, bit for bit
    handle.detach()           # the model is what it was

The model is changed in place and stays the same object of the same class.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import capture, merging
from lorakit.adapters.attached import Counts
from lorakit.adapters.attachments import Attachments
from lorakit.adapters.blocks import Layers
from lorakit.adapters.coverage import Coverage, coverage
from lorakit.adapters.identity import digest
from lorakit.adapters.merging import Merged
from lorakit.adapters.routing import Route, Routing
from lorakit.adapters.state import AdapterState
from lorakit.adapters.verification import Verification, verify
from lorakit.errors import AdapterError, MergeError, quoted
from lorakit.inits import Calibration
from lorakit.layers import Site
from lorakit.methods import Method, Update

Use = str | Sequence[str] | Mapping[str, float] | None


class Handle(Attachments):
    """The adapters on one model: choosing, looking, merging. Made by :func:`attach`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._merged: Merged | None = None

    # Choosing ------------------------------------------------------------------------------------

    def use(self, which: Use) -> None:
        """Choose what acts on every row: a name, several names, weights by name, or None for the base alone."""
        self.refuse_merged("choose what acts")
        if which is None:
            weights: dict[str, float] = {}
        elif isinstance(which, str):
            weights = {which: 1.0}
        elif isinstance(which, Mapping):
            weights = {name: float(weight) for name, weight in which.items()}
        else:
            weights = dict.fromkeys(which, 1.0)
        self.known(weights)
        self.active.weights = weights

    def strengthen(self, name: str, strength: float) -> None:
        """Set a lasting factor on an adapter's effect: 1 as trained, 0 none, negative reversed."""
        self.refuse_merged("change a strength")
        self.known([name])
        self.active.strengths[name] = float(strength)

    @contextlib.contextmanager
    def using(self, which: Use) -> Iterator[None]:
        """Within the block other adapters act, see :meth:`use`; afterwards those from before."""
        before, routing = self.active.weights, self.active.routing
        self.use(which)
        self.active.routing = None
        try:
            yield
        finally:
            self.active.weights, self.active.routing = before, routing

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model is the untouched base, bit for bit."""
        return self.using(None)

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Within the block each row, or position, of the batch has its own adapter.

        Args:
            route: a name or None (the base alone) per row, or per row a list with one per position.

        Raises:
            AdapterError: an unknown name, or an adapter that acts on the model as a whole.
            RoutingError: in the forward, where a layer's input does not say whose positions it has.
        """
        self.refuse_merged("route rows")
        routing = Routing(route)
        self.known(routing.names)
        whole = [name for name in routing.names if self.adapters[name].parts]
        if whole:
            raise AdapterError(f"{quoted(whole)} act on the model as a whole and cannot be routed by row.")
        before, self.active.routing = self.active.routing, routing
        try:
            yield
        finally:
            self.active.routing = before

    # Looking -------------------------------------------------------------------------------------

    def updates(self, name: str | None = None) -> dict[str, Update]:
        """Return an adapter's updates by layer path."""
        name = self.one(name)
        entry = self.entry(name)
        found = {p: b for p, _, b in entry.branches(self.model, name) if p not in entry.rows}
        return {path: branch for path, branch in found.items() if isinstance(branch, Update)}

    def counts(self, name: str | None = None) -> Counts:
        """Count an adapter's numbers and the base's."""
        self.entry(self.one(name))
        return capture.counts(self, self.one(name))

    def coverage(self, name: str | None = None) -> Coverage:
        """Say which share of the base's matrix parameters an adapter reaches."""
        entry = self.entry(self.one(name))
        sites = [Site.at(self.model, path) for path in (*entry.paths, *entry.rows)]
        return coverage(self.model, sites, entry.full_modules)

    def delta(self, path: str, name: str | None = None) -> Tensor:
        """Return one layer's update as a matrix, ``[d_out, d_in]`` in fp32, at strength 1."""
        self.refuse_merged("take an update apart")
        self.entry(self.one(name))
        return merging.delta(self, path, self.one(name))

    def state(self, name: str | None = None) -> AdapterState:
        """Return an adapter as plain data: detached copies on the CPU."""
        self.refuse_merged("read the base's identity")
        self.entry(self.one(name))
        return capture.capture(self, self.one(name))

    def digest(self) -> str:
        """Return the sha256 over every byte of the base."""
        self.refuse_merged("digest the base")
        return digest(self.model)

    def verify(self, *args: Any, digest_before: str | None = None, **kwargs: Any) -> Verification:
        """Prove on ``model(*args, **kwargs)`` that every site moves the output.

        Args:
            *args: the model's inputs.
            **kwargs: the model's inputs by name.
            digest_before: what :meth:`digest` said earlier; then also that no base byte has changed.

        Raises:
            VerificationError: a site is dead, or the base has changed.
        """
        return verify(self, args, kwargs, digest_before)

    # Merging -------------------------------------------------------------------------------------

    @property
    def merged(self) -> Merged | None:
        """What is merged into the weights now, or None."""
        return self._merged

    def refuse_merged(self, what: str) -> None:
        """Raise a MergeError where adapters are merged now."""
        if self._merged is not None:
            raise MergeError(f"cannot {what}: {quoted(list(self._merged.weights))} merged now. Call unmerge() first.")

    def merge(self, which: Use = None, *, keep: str = "memory") -> Merged:
        """Put ``round(W0 + sum w_i delta_i)``, computed in fp32, in place of the weights.

        Args:
            which: what to merge, as in :meth:`use`; None for what acts now.
            keep: 'memory' keeps the original weights for :meth:`unmerge`; 'none' keeps nothing.

        Raises:
            MergeError: it cannot be exact; the model is unchanged then.
        """
        self.refuse_merged("merge twice")
        before = self.active.weights
        if which is not None:
            self.use(which)
        try:
            merged = merging.merge(self, keep)
        except BaseException:
            self.active.weights = before
            raise
        self._merged, self.active.merged = merged, True
        return merged

    def unmerge(self) -> None:
        """Put every original weight back, bit for bit.

        Raises:
            MergeError: nothing is merged, or the originals were not kept.
        """
        if self._merged is None:
            raise MergeError("nothing is merged. Call merge() first.")
        merging.unmerge(self._merged)
        self._merged, self.active.merged = None, False

    def bake(self) -> nn.Module:
        """Make a merge final: return the model plain again, with the merged weights.

        Raises:
            MergeError: nothing is merged.
        """
        if self._merged is None:
            raise MergeError("nothing is merged. Call merge() first.")
        self._merged, self.active.merged = None, False
        return self.detach()


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle on a model, or None where nothing is attached; a deep copy has its own."""
    handle = model.__dict__.get("_lorakit_handle")
    return handle if isinstance(handle, Handle) else None


def attach(
    model: nn.Module,
    method: Method | str | Mapping[str, Any] = "lora",
    targets: str | Iterable[str] = "all-linear",
    *,
    name: str = "default",
    exclude: str | Iterable[str] | None = None,
    layers: Layers | None = None,
    train_modules: str | Iterable[str] = (),
    new_modules: Sequence[str] = (),
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
    blank: bool = False,
) -> Handle:
    """Attach an adapter to ``model`` in place (no base weight is written) and return the handle.

    >>> model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    >>> attach(model, {"name": "lora", "rank": 10}, "0").counts().updates  # 10 * (100 + 100) instead of 100 * 100
    2000

    Args:
        model: any ``nn.Module``; its parameters stop requiring gradients until :meth:`Handle.detach`.
        method: a method, such as ``LoRA(rank=8)``, or its name.
        targets: layers by path, suffix, glob, ``re:`` expression, or a word: 'attention', 'mlp', 'all-linear'.
        name: the adapter's name.
        exclude: entries like those of ``targets``, to leave out again.
        layers: block numbers to keep: ``"0-5"``, ``"last:4"``, ``[0, 2]``.
        train_modules: modules of which the adapter trains its own full copy: paths, suffixes or 'head'; or rows of
            an embedding or a head, such as ``embed_tokens[32000:32010]``.
        new_modules: modules that the base's checkpoint did not hold, left out of the base's identity.
        seed: seed of the starting values; None draws one from torch's generator.
        dtype: dtype of the adapter's parameters, on a base of any dtype.
        calibration: examples for methods and inits that look at the model before they start.
        blank: start from zeros of the same sizes, without drawing or looking.

    Raises:
        InputError: a target, layer, rank, name or calibration that will not do; every such one is named.
    """
    existing = handle_of(model)
    handle = existing or Handle(model)
    try:
        handle.add(
            name,
            method,
            targets,
            exclude=exclude,
            layers=layers,
            train_modules=train_modules,
            new_modules=new_modules,
            seed=seed,
            dtype=dtype,
            calibration=calibration,
            blank=blank,
        )
        return handle
    except BaseException:
        if existing is None:
            handle.detach()
        raise
