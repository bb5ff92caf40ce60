"""Gradients through reentrant gradient checkpointing over a frozen embedding.

``torch.utils.checkpoint(use_reentrant=True)`` builds a graph only where an input of the block requires
gradients. With the base frozen the first block's input does not, and every adapter inside checkpointed
blocks would stay without gradient. Where a transformers model has checkpointing switched on, the output
of each input embedding is therefore made to require gradients while training. (transformers does so by
itself for models that read token ids, not for those that read pixels or sound.) The other form of it
needs none: there nothing below the lowest adapted layer is differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputGradients:
    """The hooks on a model's input embeddings; they act only while some module has reentrant checkpointing on."""

    def __init__(self, model: nn.Module) -> None:
        """Register a hook on each input embedding of ``model``; nothing where none of its modules checkpoints."""
        # transformers' convention: a module that can be checkpointed carries this flag, False until switched on.
        self.switches = [m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is not None]
        embeddings = input_embeddings(model) if self.switches else []
        self.hooks: list[RemovableHandle] = [module.register_forward_hook(self.require) for module in embeddings]

    def require(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Make an embedding's output require gradients where a checkpointed block will read it."""
        if not module.training or not isinstance(out, Tensor) or out.requires_grad or not torch.is_grad_enabled():
            return
        if any(_is_reentrant(switch) for switch in self.switches):
            out.requires_grad_(True)

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self.hooks:
            hook.remove()


def _is_reentrant(switch: nn.Module) -> bool:
    """Tell whether a module checkpoints now, and not plainly in the form that is not reentrant."""
    own = vars(switch)
    checkpoint = own.get("_gradient_checkpointing_func")
    told = checkpoint.keywords if isinstance(checkpoint, functools.partial) else {}
    return bool(own.get("gradient_checkpointing", False)) and told.get("use_reentrant") is not False


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return what each transformers model within ``model`` names as its input embedding, each once."""
    return list(dict.fromkeys(_named_embeddings(model)))


def _named_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        ask = getattr(module, "get_input_embeddings", None)
        if callable(ask):
            try:
                found = ask()
            except NotImplementedError:  # a model whose input is no embedding says so in this way
                continue
            if isinstance(found, nn.Module):
                yield found
