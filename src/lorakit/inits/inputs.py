"""What goes into the base's layers on examples: token by token without padding, and its principal components.

Layers that read one and the same tensor, as q, k and v or gate and up do, are looked at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import DataError, UnsupportedLayerError, quoted
from lorakit.inits.calibration import Batch, Calibration, undisturbed
from lorakit.layers import BranchOps, Site

CHUNK = 256
"""Tokens per update of the components: a decomposition of a few hundred rows, whatever the batch."""

LEAST_KEPT = 64

Take = Callable[[str, Tensor], None]


def input_refusal(site: Site) -> str | None:
    """Return why a layer's input is not rows that its matrix multiplies, or None where it is."""
    if site.ops.input_is_index:
        return "an embedding's inputs are indices, which have no variance to look at"
    if not isinstance(site.ops, BranchOps) or site.stack:
        return "it multiplies by its weights itself, so that the inputs of each cannot be seen"
    if not site.ops.channels_last:
        return "the inputs of a convolution are maps, not rows"
    return None


def refuse_inputs(sites: Sequence[Site]) -> None:
    """Refuse sites whose inputs cannot be looked at, all by name.

    Raises:
        UnsupportedLayerError: there are some.
    """
    refused: dict[str, list[str]] = {}
    for site in sites:
        if (why := input_refusal(site)) is not None:
            refused.setdefault(why, []).append(site.path)
    if refused:
        lines = "; ".join(f"{quoted(paths)}: {why}" for why, paths in refused.items())
        raise UnsupportedLayerError(f"{lines}. Exclude these, or take an init that does not look at inputs.")


def shared_inputs(model: nn.Module, sites: Sequence[Site], calibration: Calibration) -> dict[str, str]:
    """Return for each site's path the host whose input it reads too: the first one to read it in a forward pass.

    Raises:
        UnsupportedLayerError: layers without rows as inputs.
        DataError: no examples.
    """
    refuse_inputs(sites)
    tensors: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}
    read: dict[str, list[int]] = {}
    numbers = iter(range(10**9))

    def see(host: str, x: Tensor) -> None:
        key = id(x), x._version
        if key not in tensors or tensors[key][0]() is not x:  # another tensor may stand where one was
            tensors[key] = weakref.ref(x), next(numbers)
        read.setdefault(host, []).append(tensors[key][1])

    _run(model, {site.host: None for site in sites}, calibration, calibration.shares()[0][0], see)
    leaders: dict[tuple[int, ...], str] = {}
    own = {host: leaders.setdefault(tuple(seen), host) for host, seen in read.items()}
    return {site.path: own.get(site.host, site.host) for site in sites}


def look_at_inputs(
    model: nn.Module,
    hosts: Iterable[str],
    calibration: Calibration,
    take: Take,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Give ``take`` the inputs of these layers, batch by batch, as fp32 rows ``[tokens, d_in]`` without padding.

    The model runs in evaluation mode, without gradients, and is as before afterwards.

    Args:
        model: the bare base.
        hosts: whose inputs, one path of each that :func:`shared_inputs` has found to be alike.
        calibration: the examples.
        take: called with a host and its rows, once for each time it runs.
        enough: asked after each batch whether to stop.

    Raises:
        DataError: no examples, inputs that are not finite, or whose padding cannot be told.
    """
    for batch, _ in calibration.shares():
        mask = calibration.counted(batch)

        def see(host: str, x: Tensor, mask: Tensor | None = mask) -> None:
            rows = _real(host, x, mask)
            if not bool(rows.isfinite().all()):
                raise DataError(f"the inputs of '{host}' on the examples are not finite.")
            if len(rows):
                take(host, rows.float())

        _run(model, hosts, calibration, batch, see)
        if enough():
            return


@torch.no_grad()
def _run(model: nn.Module, hosts: Iterable[str], calibration: Calibration, batch: Batch, see: Take) -> None:
    """Run a batch and show what each of these layers reads."""

    def hook_at(host: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(host, args[0] if args else next(iter(kwargs.values())))

        return hook

    with undisturbed(model):
        layers = {host: model.get_submodule(host) for host in hosts}  # a host by several sites once
        handles = [layer.register_forward_pre_hook(hook_at(host), with_kwargs=True) for host, layer in layers.items()]
        try:
            calibration.loss(model, batch)  # runs the model as its task does
        finally:
            for handle in handles:
                handle.remove()


def _real(host: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of an input that are not padding.

    Raises:
        DataError: the input has other positions than the mask.
    """
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or bool(mask.all()) or tuple(x.shape[:-1]) == (mask.shape[0],):
        return flat  # nothing is padding, or each example has one vector
    if tuple(x.shape[:-1]) != tuple(mask.shape) and tuple(x.shape[:-1]) != (mask.numel(),):
        raise DataError(
            f"the inputs of '{host}' are {tuple(x.shape)}, the batch's positions {tuple(mask.shape)}: which of them "
            "are padding cannot be told. Give batches without padding, such as single rows, or exclude the layer."
        )
    return flat[mask.reshape(-1).to(x.device, torch.bool)]


class Components:
    """Principal components of rows that come bit by bit (Ross, Lim, Lin, Yang 2008, incremental PCA with mean).

    The running ``diag(S) V`` of what has been seen, the new rows less their mean, and one row for the shift of the
    mean are stacked and decomposed again; the sum of squares is kept beside it, exactly.

    Attributes:
        count: how many components are wanted; ``kept`` are more, so that little is lost on the way.
        num_rows: rows seen.
        mean: their mean, ``[d]``.
        S: singular values of the centred rows, largest first.
        V: directions as rows, ``[kept, d]``.
        total: sum of the squares of all centred rows.
    """

    def __init__(self, count: int) -> None:
        self.count, self.kept = count, max(2 * count, LEAST_KEPT)
        self.num_rows, self.total = 0, 0.0
        self.mean, self.S, self.V = torch.zeros(0), torch.zeros(0), torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        """Take rows ``[tokens, d]``."""
        for chunk in torch.split(rows, max(CHUNK, self.kept)):
            self._add(chunk)

    def _add(self, rows: Tensor) -> None:
        if self.num_rows == 0:
            self.mean, self.S = rows.new_zeros(rows.shape[1]), rows.new_zeros(0)
            self.V = rows.new_zeros(0, rows.shape[1])
        before, new = self.num_rows, len(rows)
        mean = rows.mean(dim=0)
        shift = self.mean - mean
        weight = before * new / (before + new)
        centred = rows - mean
        stacked = torch.cat([self.S[:, None] * self.V, centred, weight**0.5 * shift[None]])
        _, S, V = torch.linalg.svd(stacked, full_matrices=False)
        self.S, self.V = S[: self.kept], V[: self.kept]
        self.total += float(centred.double().square().sum() + weight * shift.double().square().sum())
        self.mean = self.mean + (new / (before + new)) * (mean - self.mean)
        self.num_rows = before + new

    def ratios(self) -> Tensor:
        """Return the share of the variance that each component explains, ``[count]``, in fp64."""
        squares = self.S[: self.count].double().square()
        return squares / self.total if self.total > 0 else squares

    def directions(self) -> Tensor:
        """Return the wanted components as rows, ``[count, d]``, orthonormal, largest entry positive."""
        V = self.V[: self.count]
        largest = V.gather(1, V.abs().argmax(dim=1, keepdim=True))
        return torch.where(largest < 0, -V, V)


class Watched:
    """The components of every input, until none of them turns any more.

    An input has converged once each wanted component's cosine with itself one batch before is at least ``tau``; it is
    not looked at any further.
    """

    def __init__(self, counts: Mapping[str, int], tau: float) -> None:
        """Take how many components are wanted by host."""
        self.tau = tau
        self.inputs = {host: Components(count) for host, count in counts.items()}
        self.converged: set[str] = set()

    def take(self, host: str, rows: Tensor) -> None:
        """Take a batch's rows of one input."""
        if host in self.converged:
            return
        seen = self.inputs[host]
        before = seen.V[: seen.count]
        seen.add(rows)
        after = seen.V[: seen.count]
        full = len(before) == len(after) == seen.count and seen.num_rows > seen.count
        if full and bool(((before * after).sum(dim=1).abs() >= self.tau).all()):
            self.converged.add(host)

    def all_converged(self) -> bool:
        """Tell whether every input has converged."""
        return len(self.converged) == len(self.inputs)


def components_of_inputs(
    model: nn.Module, sites: Sequence[Site], counts: Mapping[str, int], calibration: Calibration, tau: float
) -> dict[str, Components]:
    """Return the principal components of each site's inputs by path; layers that share an input share the object.

    Args:
        model: the bare base.
        sites: whose inputs.
        counts: how many components by path, at most the inputs' width.
        calibration: the examples; no more of them are looked at than needed.
        tau: cosine from which on a component counts as found.

    Raises:
        DataError: too few tokens for so many components.
        UnsupportedLayerError: layers without rows as inputs.
    """
    leaders = shared_inputs(model, sites, calibration)
    wanted: dict[str, int] = {}
    for path, host in leaders.items():
        wanted[host] = max(wanted.get(host, 0), counts[path])
    watched = Watched(wanted, tau)
    look_at_inputs(model, wanted, calibration, watched.take, watched.all_converged)
    few = [
        f"'{path}' needs more than {wanted[host]} and has {watched.inputs[host].num_rows}"
        for path, host in leaders.items()
        if watched.inputs[host].num_rows <= wanted[host]
    ]
    if few:
        raise DataError(
            f"the examples have too few tokens for so many components: {'; '.join(few[:8])}. Give more examples, or a "
            "lower rank."
        )
    return {path: watched.inputs[host] for path, host in leaders.items()}
