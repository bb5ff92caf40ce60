"""Which adapted linear layers read the same input, found while the model runs.

An architecture is not asked for: layers that are called one after the other with the very same tensor (query, key and
value; gate and up) are readers of one input. From the optimizer's next step on the first of them computes for all, in
one node of the graph, and the others find their output ready. A layer that is then called with anything else computes
for itself, and is no longer counted among them.

A group changes only between optimizer steps: recomputation in the backward pass (gradient checkpointing) must find
the groups of its forward pass, and no graph from before a step is differentiated after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kernels.dropout import draw_seed
from lorakit.kernels.steps import optimizer_steps


class Readers:
    """The inputs of a model's adapted layers, one at a time, and who read them.

    Nothing of it outlives a copy: a copied or unpickled model finds its groups again.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1
        self._seed: int | None = None
        self._leader: nn.Module | None = None
        self._used: dict[nn.Module, list[nn.Module]] = {}
        self._called: set[nn.Module] = set()
        self._ready: dict[nn.Module, Tensor] = {}
        self._groups: dict[nn.Module, dict[nn.Module, int]] = {}
        self._alone: set[nn.Module] = set()
        self._left_as_it_is: dict[nn.Module, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Readers, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Readers:
        return Readers()

    def settle(self) -> bool:
        """Let what was found count at once: whoever calls this holds no graph from before.

        Returns:
            Whether layers were newly seen to keep their outputs: only another pass shows who reads with them.
        """
        for group in self._groups.values():
            group.update(dict.fromkeys(group, -1))
        shows_more = any(step != -1 for step in self._left_as_it_is.values())
        self._left_as_it_is.update(dict.fromkeys(self._left_as_it_is, -1))
        return shows_more

    def enter(self, host: nn.Module, x: Tensor) -> None:
        """Take note of a layer that is called, and its input: another one than before, or the same in another pass."""
        version = -1 if x.is_inference() else x._version  # torch counts no writes in inference mode
        is_same = self._input is not None and self._input() is x and self._version == version
        if not is_same or host in self._called:
            for member in self._ready:  # computed for nothing
                self._leave(member)
            self._ready.clear()
            self._called.clear()
            self._input, self._version = weakref.ref(x), version
            self._seed, self._leader = None, None
        self._called.add(host)

    def seed(self) -> int:
        """Return the dropout seed of the input at hand: the same for all that read it in one pass."""
        if self._seed is None:
            self._seed = draw_seed()
        return self._seed

    def keeps_output(self, host: nn.Module) -> bool:
        """Tell whether a layer's output was seen, before the last optimizer step, to be left as it is by its users."""
        now = optimizer_steps()
        return self._left_as_it_is.get(host, now) != now

    def watch(self, host: nn.Module, out: Tensor) -> None:
        """See whether anything writes to a layer's output before its gradient comes."""
        if not out.requires_grad or host in self._left_as_it_is:
            return
        if type(out) is not Tensor:  # a simulation's holds no numbers that could be written to
            self._left_as_it_is[host] = optimizer_steps()
            return
        seen, version = out.detach(), out._version
        seen.data = out.new_empty(0)  # it counts writes to the output and holds none of its numbers

        def check(_: Tensor) -> None:
            if seen._version == version:
                self._left_as_it_is.setdefault(host, optimizer_steps())

        out.register_hook(check)  # type: ignore[no-untyped-call]

    def take(self, host: nn.Module) -> Tensor | None:
        """Return an entered layer's output where its group's first one has computed it."""
        return self._ready.pop(host, None)

    def outputs(self, host: nn.Module, compute: Compute) -> Tensor:
        """Return an entered layer's output, computed now, and keep those of its group for :meth:`take`.

        Args:
            host: the layer.
            compute: called with layers that read its input, ``host`` first; returns an output for each, or None for
                one that must compute for itself.
        """
        members = [host]
        if self._leader is None:
            self._leader = host
            members += self._members(host)
        elif host not in self._alone:
            self._groups.setdefault(self._leader, {}).setdefault(host, optimizer_steps())
        found, *others = compute(members)
        assert found is not None
        self._ready.update({member: out for member, out in zip(members[1:], others, strict=True) if out is not None})
        return found

    def _members(self, host: nn.Module) -> list[nn.Module]:
        """Return who else reads the first layer's input; in a recomputation, as it was in the forward pass.

        None without gradients: a loaded adapter is to give the bits of the trained one, whose groups are known.
        """
        if torch._C._current_graph_task_id() == -1:
            learned, now = self._groups.get(host, {}), optimizer_steps()
            grad = torch.is_grad_enabled()
            self._used[host] = [member for member, step in learned.items() if grad and step != now]
        return self._used.get(host, [])

    def _leave(self, host: nn.Module) -> None:
        self._alone.add(host)
        for group in self._groups.values():
            group.pop(host, None)


Compute = Callable[[Sequence[nn.Module]], Sequence[Tensor | None]]
