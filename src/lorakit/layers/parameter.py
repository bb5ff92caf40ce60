"""Any parameter ``[d_out, d_in]`` or ``[E, d_out, d_in]`` of a module that has no ops of its own.

PEFT's ``target_parameters``: named outright, never meant by a word. The module runs with the updated
parameter; ``verify`` finds one that its forward does not read.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from lorakit.errors import RoutingError
from lorakit.layers.experts import StackOps
from lorakit.layers.ops import host_class


class ParameterOps(StackOps):
    """A parameter by its name."""

    kind = "parameter"

    def __init__(self, parameter: str) -> None:
        super().__init__(parameter, "")

    @override
    def positions(self, layer: nn.Module, x: Any) -> tuple[int, ...]:
        raise RoutingError(
            f"the parameter '{self.parameter}' of a {host_class(layer).__name__} is updated: whose the positions of "
            "this module's input are is not known, so that they cannot be routed."
        )
