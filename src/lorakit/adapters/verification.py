"""``verify``: proof on real inputs that the base is untouched and that every site moves the output.

Each branch of the acting adapters is filled with noise once, and the model's output must differ from
before: a layer whose weight a parent reads by itself, or that never runs, would be found here. The
adapter's own numbers return bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.adapters.copies import ModuleCopy
from lorakit.adapters.identity import digest
from lorakit.errors import MergeError, VerificationError, quoted

if TYPE_CHECKING:
    from lorakit.adapters.attachments import Attachments


@dataclass(frozen=True)
class Verification:
    """What was proven.

    Attributes:
        num_sites: branches that were perturbed; each one moved the output.
        digest: sha256 over every byte of the base.
        base_unchanged: whether it equals the digest from before; None if none was given.
    """

    num_sites: int
    digest: str
    base_unchanged: bool | None


@torch.no_grad()
def verify(
    handle: Attachments, args: Sequence[Any], kwargs: Mapping[str, Any], digest_before: str | None = None
) -> Verification:
    """Prove that each acting branch moves ``model(*args, **kwargs)`` and that no base byte changed.

    Raises:
        VerificationError: a site does not move the output, or the base has changed.
        MergeError: adapters are merged now.
    """
    if handle.active.merged:
        raise MergeError("adapters are merged: the base's weights are replaced now. Call unmerge() first.")
    found = digest(handle.model)
    if digest_before is not None and found != digest_before:
        raise VerificationError(f"the base has changed: its digest was {digest_before[:12]} and is {found[:12]}.")
    training = {module: module.training for module in handle.model.modules()}
    handle.model.eval()
    dead, count = [], 0
    try:
        reference = output_tensors(handle.model(*args, **kwargs))
        for name in [n for n in handle.active.weights if handle.active.strength(n) != 0.0]:
            for path, parameters in branch_parameters(handle, name):
                count += 1
                with perturbed(parameters):
                    moved = output_tensors(handle.model(*args, **kwargs))
                if all(_same(a, b) for a, b in zip(reference, moved, strict=True)):
                    dead.append(path)
    finally:
        for module, flag in training.items():
            module.training = flag
    if dead:
        raise VerificationError(
            f"{len(dead)} of {count} sites do not move the output: {quoted(dead)}. Something reads these layers' "
            "weights itself or never runs them on these inputs; exclude them from the targets."
        )
    return Verification(count, found, None if digest_before is None else True)


def _same(before: Tensor, after: Tensor) -> bool:
    """Tell whether two outputs are the same; what is no number in both (rows that attend to nothing) is."""
    return bool(((before == after) | (before.isnan() & after.isnan())).all())


def branch_parameters(handle: Attachments, name: str) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield each branch of an adapter with its trained parameters."""
    entry = handle.adapters[name]
    for path, _, branch in entry.branches(handle.model, name):
        own = branch.own_parameters() if isinstance(branch, ModuleCopy) else dict(branch.named_parameters())
        if own:  # a layer that got rank 0 has none
            yield path, list(own.values())
    for key, part in entry.parts.items():
        yield key, list(part.parameters())


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Fill parameters with noise of unit size within the block; afterwards every bit is back."""
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data.add_(noise.to(parameter))
        yield
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.data.copy_(original)


def output_tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in output_tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in output_tensors(value)]
    return []
