"""The optimizers, over the groups of parameters that a method asks for, and their state as tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorakit.methods import Rule

Groups = list[dict[str, Any]]

MOMENTUM = 0.9
LARGER_RATE = {"adamw": 1.0, "sgd": 100.0, "adafactor": 100.0}
"""How many times AdamW's learning rate an optimizer likes.

AdamW's step is about the rate itself whatever the gradient's size; SGD's is the gradient times the rate, and an
adapter's gradients are small; Adafactor's is the rate times the parameter's own size, which for B is 0.001 at first.
With these, 60 steps of each bring a MiniLM classifier of eight intents to about the same validation loss.
"""


def adamw(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in torch's one-pass form."""
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def sgd(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """Return gradient descent with momentum 0.9."""
    return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, momentum=MOMENTUM)


def adafactor(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """Return Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): second moments by row and column alone."""
    return torch.optim.Adafactor(groups, lr=lr, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[[Groups, float, float], Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
}


def optimizer_for(
    rule: Rule, named: Mapping[str, nn.Parameter], kind: str, lr: float, weight_decay: float
) -> Optimizer:
    """Return the optimizer ``kind`` over an adapter's parameters in its method's groups.

    Each group keeps the peak of its rate as ``peak``.
    """
    groups = [{**group, "peak": float(group["lr"])} for group in rule.groups(named, lr)]
    return OPTIMIZERS[kind](groups, lr, weight_decay)


def state_tensors(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return what the optimizer remembers: copies on the CPU, called ``<parameter>/<entry>``."""
    found = {}
    for name, parameter in named.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                found[f"{name}/{entry}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


def load_state_tensors(optimizer: Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer what :func:`state_tensors` returned, in each parameter's own memory layout.

    Raises:
        KeyError: a tensor belongs to a parameter that is not there.
    """
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = named[name]
        if tensor.shape == parameter.shape:  # sums over memory in another order would be other sums
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        else:
            value = tensor.clone()
        # AdamW's fused form counts its steps where the parameters are; the others count on the CPU.
        fused = bool(optimizer.defaults.get("fused"))
        optimizer.state[parameter][entry] = value.to(parameter.device) if entry != "step" or fused else value
