"""What the digits demo proves of its network and adapters, and what each adapter adds to each layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.adapters import AdapterState, Handle
from lorakit.adapters.spectrum import singular_values
from lorakit.demos.digits_data import Part
from lorakit.methods.lora import LoRA
from lorakit.reports.digits_record import ChangedDigit, Claim, LayerUpdate

# The weights are below 1, where neighbouring fp32 numbers lie 6e-8 apart: the room of a few roundings.
EFFECTIVE_WEIGHT_TOLERANCE = 2.5e-7
SHOWN_DIGITS = 12


def effective_weight(W0: Tensor, state: AdapterState, path: str) -> Tensor:
    """Return ``W0 + scale B A`` of one layer (Hu et al. 2021, eq. 3), ``[d_out, d_in]``, from an adapter's data."""
    assert isinstance(state.method, LoRA)
    tensors = state.sites[path].tensors
    return W0 + state.method.scale_at(path) * (tensors["B"] @ tensors["A"])


@torch.no_grad()
def merged_difference(handle: Handle, name: str) -> float:
    """Merge an adapter, compare every layer's weight with one made by hand, and unmerge.

    Returns:
        The largest absolute difference of an entry.
    """
    model, state = handle.model, handle.state(name)
    expected = {p: effective_weight(model.get_parameter(f"{p}.weight"), state, p) for p in state.sites}
    handle.merge(name)
    try:
        return max(float((model.get_parameter(f"{p}.weight") - W).abs().max()) for p, W in expected.items())
    finally:
        handle.unmerge()


def claims(handle: Handle, digest_before: str, before: Tensor, disabled: Tensor) -> tuple[Claim, ...]:
    """Prove what must be so whatever was learned.

    Args:
        handle: on the network, with trained adapters.
        digest_before: the network's digest before the first adapter was attached.
        before: the network's logits on the test before that, ``[n, 10]``.
        disabled: its logits with the adapters switched off.
    """
    digest = handle.digest()
    same = int((before.argmax(1) == disabled.argmax(1)).sum())
    found = [
        Claim(
            "the network's own numbers are untouched",
            digest == digest_before,
            f"sha256 over every byte: {shown(digest_before)} before, {shown(digest)} after both trainings",
        ),
        Claim(
            "switched off, every prediction returns",
            same == len(before) and torch.equal(before, disabled),
            f"{same:,} of {len(before):,} predictions; "
            + ("all logits bit for bit" if torch.equal(before, disabled) else "logits differ"),
        ),
    ]
    for name in handle.names:
        difference = merged_difference(handle, name)
        found.append(
            Claim(
                f"with '{name}' a weight is W0 + scale B A",
                difference <= EFFECTIVE_WEIGHT_TOLERANCE,
                f"merged, against the same by hand: largest difference {difference:.2g} "
                f"(allowed {EFFECTIVE_WEIGHT_TOLERANCE:.2g})",
            )
        )
    digest = handle.digest()
    found.append(Claim("unmerging restores every bit", digest == digest_before, f"sha256 afterwards: {shown(digest)}"))
    return tuple(found)


def shown(digest: str) -> str:
    """Shorten a digest for reading."""
    return f"{digest[:SHOWN_DIGITS]}…"


def layer_updates(model: nn.Module, state: AdapterState) -> tuple[LayerUpdate, ...]:
    """Describe what an adapter adds to each layer."""
    assert isinstance(state.method, LoRA)
    found = []
    for path, site in state.sites.items():
        A, B = site.tensors["A"], site.tensors["B"]
        values = singular_values(A, state.method.scale_at(path) * B)
        W0 = model.get_parameter(f"{path}.weight").detach()
        found.append(
            LayerUpdate(
                path=path,
                d_in=A.shape[1],
                d_out=B.shape[0],
                num_numbers=A.numel() + B.numel(),
                singular_values=tuple(values.tolist()),
                relative_norm=float(torch.linalg.vector_norm(values) / torch.linalg.vector_norm(W0)),
            )
        )
    return tuple(found)


def changed(before: Tensor, after: Tensor, part: Part) -> tuple[tuple[ChangedDigit, ...], tuple[ChangedDigit, ...]]:
    """Return the images that were wrong and are right, and those that were right and are wrong.

    Args:
        before: the network's logits, ``[n, 10]``.
        after: those with an adapter.
        part: the images.
    """
    was, now = before.argmax(1), after.argmax(1)
    right_before, right_now = was == part.labels, now == part.labels

    def listed(which: Tensor) -> tuple[ChangedDigit, ...]:
        rows = which.nonzero()[:, 0].tolist()
        return tuple(ChangedDigit(i, int(part.labels[i]), int(was[i]), int(now[i])) for i in rows)

    return listed(~right_before & right_now), listed(right_before & ~right_now)
