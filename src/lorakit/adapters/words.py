"""What the words 'attention', 'mlp' and 'all-linear' mean: read from where a layer stands, never from a list of models.

The names and classes around a layer say what it is for, the nearest first: ``h.0.attn.c_proj`` belongs to
an attention, ``h.0.mlp.c_proj`` to a feed-forward. Where none says anything, the plain layers of a block
that attends are its feed-forward (``layers.0.fc1``, ``layer.0.output.dense``), unless the block has one by
name, or they stand beside a convolution or parameters of their module's own (state-space mixers).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import FunctionType

from torch import nn

from lorakit.layers import BranchOps, Site
from lorakit.layers.ops import host_class

WORDS = ("attention", "mlp", "all-linear")

# Signs in the name of a module, and in that of its class, which may begin with a model's name.
_SIGNS = {
    "attention": (re.compile(r"attn|attention"), re.compile("Attention")),
    "mlp": (
        re.compile(r"mlp|ff[nw]|feed_?forward|expert|moe|^ff\d*$|^ff_"),
        re.compile("MLP|Mlp|FFN|FeedForward|Experts"),
    ),
}


def sites_of_word(word: str, sites: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Return what a word means among ``sites``, whole weights of a model's ``modules``, both by path.

    ``all-linear`` are the layers that multiply vectors by matrices, recurrent ones and stacks of experts
    too, but no router and none whose weight its parent reads past it; ``attention`` and ``mlp`` are those
    of them in an attention, and in the feed-forward of a numbered block.
    """
    unread = {
        f"{path}.{child}"
        for path, module in modules.items()
        for child in _read_past(host_class(module))  # type: ignore[arg-type]  # a class is hashable
    }
    linear = {p: s for p, s in sites.items() if s.ops.matrix_input and s.host not in unread and not _is_router(p)}
    if word == "all-linear":
        return linear
    roles = _roles(linear, modules)
    return {path: site for path, site in linear.items() if roles[path] == word}


def _roles(sites: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """Say of every layer whether it is 'attention', 'mlp' or neither (None)."""
    in_attention, _ = _SIGNS["attention"]
    roles = {p: "attention" if s.ops.is_attention else _said(p, modules) for p, s in sites.items()}
    attends = [path for path, role in roles.items() if role == "attention"]
    attending = {block for path in attends for block in _blocks(path)}
    stages = {block for path in attends for block in _blocks(path)[:-1]}  # they hold blocks
    named = {
        _blocks(p)[-1]
        for p, role in roles.items()
        if role == "mlp" and _blocks(p) and not in_attention.search(p.lower())
    }
    for path, site in sites.items():
        # A plain stack of numbered layers, in a model without any attention, is a feed-forward as well.
        blocks = _blocks(path) or ([] if attends or not path.rpartition(".")[2].isdigit() else [path])
        if roles[path] == "mlp" and not (blocks or site.stack):
            roles[path] = None
        elif roles[path] is None and blocks and isinstance(site.ops, BranchOps):
            inside = not attends or any(block in attending for block in blocks)
            apart = blocks[-1] in stages or blocks[-1] in named or _is_mixed(path, blocks[-1], modules)
            roles[path] = "mlp" if inside and not apart else None
    return roles


def _said(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return what the names above a layer say, the nearest first, beside its module's class."""
    parts = path.split(".")
    holder = modules.get(".".join(parts[:-1]))
    for end in range(len(parts), 0, -1):
        own = end == len(parts) - 1 and holder is not None and not parts[end - 1].isdigit()
        kind = host_class(holder).__name__ if own and holder is not None else ""
        for role, (in_name, in_class) in _SIGNS.items():
            if in_name.search(parts[end - 1].lower()) or in_class.search(kind):
                return role
    return None


def _blocks(path: str) -> list[str]:
    """Return the numbered modules above a layer, outermost first."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()]


def _is_mixed(path: str, block: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a layer's module, below the block, has convolutions or parameters of its own beside it."""
    holder = path.rpartition(".")[0]
    module = modules.get(holder)
    if module is None or holder == block or path == block:
        return False
    convolves = any(isinstance(child, nn.modules.conv._ConvNd) for child in module.children())
    return convolves or any(True for _ in module.parameters(recurse=False))


@functools.cache
def _read_past(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the children whose weights a module of transformers reads itself: it declares them to accelerate."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or "child_module_names" not in forward.__code__.co_freevars:
        return ()
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return tuple(cells["child_module_names"].cell_contents)


def _is_router(path: str) -> bool:
    """Tell whether a layer chooses experts."""
    *above, name = path.split(".")
    return name in ("gate", "shared_expert_gate") or any("router" in part for part in (*above, name))
