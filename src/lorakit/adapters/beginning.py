"""What a new adapter starts from: its method, decided on the base alone, and its updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.adapters.branches import Active
from lorakit.errors import ConfigError
from lorakit.inits import Calibration
from lorakit.kernels.dropout import prepare
from lorakit.layers import Site
from lorakit.methods import AdapterParts, Calibrated, Method


def begin(
    model: nn.Module,
    active: Active,
    method: Method,
    sites: Sequence[Site],
    calibration: Calibration | None,
    seed: int | None,
    dtype: torch.dtype,
    blank: bool,
) -> tuple[Method, AdapterParts]:
    """Return the method with everything decided, and its updates; see :func:`lorakit.attach` for the arguments.

    Raises:
        ConfigError: the method must look at examples and has none.
    """
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))) if seed is None else seed)
    found = Calibrated(method.uncalibrated(sites))
    if not blank:
        found = _calibrated(model, active, method, sites, calibration, generator)
    parts = found.method.build(model, sites, generator, dtype, found.seen)
    if not blank:  # one that is loaded may never train
        for p, kind, device in {_masked(site, parts) for site in sites}:
            if p > 0.0:
                prepare(p, kind, device)
    return found.method, parts


def _masked(site: Site, parts: AdapterParts) -> tuple[float, torch.dtype, torch.device]:
    """Return a site's dropout, and what its masks multiply."""
    weight = site.ops.weight(site.layer)
    return float(getattr(parts.updates.get(site.path), "dropout", 0.0)), weight.dtype, weight.device


def _calibrated(
    model: nn.Module,
    active: Active,
    method: Method,
    sites: Sequence[Site],
    calibration: Calibration | None,
    generator: torch.Generator,
) -> Calibrated:
    """Let the method look at the base alone, without any adapter, where it needs to."""
    why = method.looks()
    if why is None:
        return Calibrated(method)
    if calibration is None:
        raise ConfigError(
            f"{why} on examples: give them as calibration=lorakit.Calibration(batches). `lorakit train` and fit "
            "take them from the training rows."
        )
    weights, routing = active.weights, active.routing
    active.weights, active.routing = {}, None
    try:
        return method.calibrate(model, sites, calibration, generator)
    finally:
        active.weights, active.routing = weights, routing
