"""How a model is set while it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorakit.kernels.attention import quick_attention
from lorakit.kernels.recompute import recomputing


@contextlib.contextmanager
def training_mode(model: nn.Module, grad_checkpointing: bool, recompute: bool = False) -> Iterator[None]:
    """Put the model in training mode, and in evaluation mode afterwards, whatever happens.

    With ``grad_checkpointing`` the activations inside its blocks are not kept but computed again in the backward pass
    (Chen et al. 2016, arXiv 1604.06174), in the form that composes with frozen embeddings. With ``recompute`` only what
    cheap operations made is not kept, see :mod:`lorakit.kernels.recompute`. Attention on a CPU takes its gradient as
    :mod:`lorakit.kernels.attention` says.
    """
    switch: Any = model
    # transformers 5 has other names for both, and warns of the old ones.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    model.train()
    keeping = recomputing() if recompute else contextlib.nullcontext()
    if grad_checkpointing:
        getattr(switch, f"{word}_checkpointing_enable")({"use_reentrant": False})
        # This form needs no gradient of the embeddings' output, which would reach below the lowest adapted layer.
        switch.disable_input_require_grads()
    try:
        with keeping, quick_attention():
            yield
    finally:
        if grad_checkpointing:
            getattr(switch, f"{word}_checkpointing_disable")()
        model.train(False)
