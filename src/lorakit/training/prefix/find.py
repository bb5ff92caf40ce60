"""Which blocks of a model lie below all that is trained, found by watching it run; refused where that cannot be told.

No architecture is asked for. The blocks are the members of the list with most parameters among those lists that are
run. Two passes of the model itself say whether what leaves the frozen ones is a function of the row alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle
from lorakit.errors import ConfigError, quoted
from lorakit.training.mode import training_mode
from lorakit.training.prefix.blocks import Prefix, hidden_of
from lorakit.training.randomness import Randomness, own_generators

LEAVE_OUT = "or leave cache_prefix out."


@dataclass
class Called:
    """One call of a block.

    Attributes:
        block: its number in its list.
        given: its arguments by name.
        before: how many entries those had that can be written to, by name.
        after: likewise when it had run.
        out: what it returned.
    """

    block: int
    given: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int] = field(default_factory=dict)
    out: Any = None


def find_prefix(handle: Handle, name: str, run: Callable[[], object]) -> Prefix:
    """Return the blocks below everything that an adapter trains.

    Args:
        handle: the adapters on the model.
        name: the one that is trained.
        run: runs the model on a few rows.

    Raises:
        ConfigError: there are none, or what leaves them is not the same in every pass, or not all that matters.
    """
    model = handle.model
    lists = block_lists(model)
    with training_mode(model, grad_checkpointing=False), own_generators(next(model.parameters()).device, seed=0):
        calls = watched(lists, run)
        if not calls:
            raise ConfigError(
                f"cache_prefix: {type(model).__name__} runs no list of blocks, so what is frozen below the trained "
                "layers cannot be told. Leave cache_prefix out."
            )
        path = max(calls, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
        blocks, trained = lists[path], _trained(handle, name)
        count = next((i for i, block in enumerate(blocks) if _holds(block, f"{path}.{i}", trained)), len(blocks))
        if count == 0:
            raise ConfigError(
                f"cache_prefix: nothing is frozen below what is trained: block 0 of the {len(blocks)} in '{path}' is "
                f"trained already. Adapt upper blocks alone, as with layers='last:{max(1, len(blocks) // 4)}', "
                + LEAVE_OUT
            )
        prefix = _prefix(path, blocks, count, calls[path])
        _check_frozen(prefix, [place for place in handle.parameters(name) if not place.startswith(f"{path}.")], run)
        _check_exact(prefix, model, run)
    return prefix


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return a model's lists of modules by path, of two members at least, but none within another one."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            found[path] = module
    return found


@torch.no_grad()
def watched(lists: Mapping[str, nn.ModuleList], run: Callable[[], object]) -> dict[str, list[Called]]:
    """Return the calls of each list's members in a pass; a list that is not run is left out."""
    calls: dict[str, list[Called]] = {}
    with contextlib.ExitStack() as hooks:
        for path, blocks in lists.items():
            for number, block in enumerate(blocks):
                hooks.enter_context(_watching(block, number, calls, path))
        run()
    return calls


@contextlib.contextmanager
def _watching(block: nn.Module, number: int, calls: dict[str, list[Called]], path: str) -> Iterator[None]:
    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
        calls.setdefault(path, []).append(Called(number, given, _entries(given)))

    def ends(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        call = calls[path][-1]
        call.after, call.out = _entries(call.given), out

    first = block.register_forward_pre_hook(begins, with_kwargs=True)
    second = block.register_forward_hook(ends)
    try:
        yield
    finally:
        first.remove()
        second.remove()


def _entries(given: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(v) for name, v in given.items() if isinstance(v, (MutableMapping, MutableSequence))}


def _trained(handle: Handle, name: str) -> list[str]:
    """Return where an adapter acts, and what it trains anywhere."""
    return [*handle.entry(name).hosts, *handle.parameters(name)]


def _holds(block: nn.Module, path: str, trained: Sequence[str]) -> bool:
    return any(p.requires_grad for p in block.parameters()) or any(
        place == path or place.startswith(f"{path}.") for place in trained
    )


def _prefix(path: str, blocks: nn.ModuleList, count: int, calls: Sequence[Called]) -> Prefix:
    """Return the first blocks of a list, if they are run one after the other and hand on hidden states alone.

    Raises:
        ConfigError: they do not.
    """
    name = f"the blocks of '{path}'"
    own = [call for call in calls if call.block < count]
    if [call.block for call in own] != list(range(count)):
        raise ConfigError(f"cache_prefix: {name} are not run once each, in their order. Leave cache_prefix out.")
    if any("forward" in block.__dict__ for block in blocks):
        raise ConfigError(
            f"cache_prefix: something stands before the forward of {name} already, as where weights are moved between "
            "devices. Leave cache_prefix out."
        )
    grown = [key for key, size in own[-1].after.items() if size != own[0].before.get(key, size)]
    if grown:
        raise ConfigError(
            f"cache_prefix: {name} hand on more than hidden states: they write to {quoted(grown)}, which blocks above "
            "them read. Leave cache_prefix out."
        )
    out = own[-1].out
    others = list(out[1:]) if isinstance(out, tuple) else []
    states = hidden_of(out) if isinstance(out, Tensor) or (isinstance(out, tuple) and out) else None
    above = [value for call in calls if call.block >= count for value in call.given.values()]
    handed_on = any(other is value for other in others for value in above if other is not None)
    if states is None or states.dim() != 3 or handed_on:
        raise ConfigError(
            f"cache_prefix: {name} hand on more than hidden states: they return {_kind(out)}. Leave cache_prefix out."
        )
    num_others = len(others) if isinstance(out, tuple) else None
    return Prefix(path, tuple(blocks[:count]), len(blocks), num_others, states.shape[-1], states.dtype)


def _kind(out: Any) -> str:
    if isinstance(out, tuple):
        return f"({', '.join(_kind(each) for each in out)})"
    return f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"


def _check_frozen(prefix: Prefix, others: Sequence[str], run: Callable[[], object]) -> None:
    """Refuse where something is trained before the blocks.

    Raises:
        ConfigError: what leaves the blocks takes a gradient.
    """
    takes: list[bool] = []
    last = prefix.blocks[-1]
    hook = last.register_forward_hook(lambda module, args, out: takes.append(hidden_of(out).requires_grad))

    def differentiated() -> None:
        with torch.enable_grad():
            run()

    try:
        prefix.states_of(differentiated)
    finally:
        hook.remove()
    if any(takes):
        raise ConfigError(
            f"cache_prefix: {prefix} has frozen blocks, but is trained all the same ({quoted(others)}). Leave these "
            f"out of what is trained, {LEAVE_OUT}"
        )


def _check_exact(prefix: Prefix, model: nn.Module, run: Callable[[], object]) -> None:
    """Refuse where what leaves the blocks is drawn by chance.

    Raises:
        ConfigError: two passes with other random numbers differ.
    """
    device = next(model.parameters()).device
    found, drawn = [], False
    for seed in range(2):
        with own_generators(device, seed):
            before = Randomness.now(device)
            found.append(prefix.states_of(run))
            drawn = drawn or not Randomness.now(device).same(before)
    # On a GPU two passes may differ in their last bits though nothing is drawn.
    if drawn and not torch.equal(*found):
        raise ConfigError(
            f"cache_prefix: {prefix} gives something else in every pass: dropout acts there"
            f"{_dropouts(model)}. Set it to 0 in the model's config, {LEAVE_OUT}"
        )


def _dropouts(model: Any) -> str:
    found = [f"{name} {value:g}" for name, value in model.config.to_dict().items() if _is_rate(name, value)]
    return f" (its config has {', '.join(found)})" if found else ""


def _is_rate(name: str, value: Any) -> bool:
    return ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
