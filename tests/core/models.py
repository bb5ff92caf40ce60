"""Small models and methods that the tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import Handle
from lorakit.layers import Site
from lorakit.methods import AdapterParts, Method, ModelPart, find_method, method_names

ROWS = 4
# Fields for methods that do not take a rank and an alpha; alpha != rank, so that a scale left out shows.
SETTINGS: dict[str, dict[str, object]] = {}
RANK, ALPHA = 3, 5.0


def method_named(name: str, **fields: object) -> Method:
    return find_method(name, **{**SETTINGS.get(name, {"rank": RANK, "alpha": ALPHA}), **fields})


METHODS = method_names()


class OneLayer(nn.Module):
    """A model of one layer, since the root of a model is never a target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Kind:
    """One kind of host layer: how to make it (never square) and an input of ``rows`` rows."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5))


def _maps(channels: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, channels, 9, 8)


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 10), lambda rows: torch.randn(rows, 5, 6)),
    "linear without bias": Kind(lambda: nn.Linear(7, 4, bias=False), lambda rows: torch.randn(rows, 7)),
    "embedding": Kind(lambda: nn.Embedding(11, 6), _tokens),
    "embedding with padding": Kind(lambda: nn.Embedding(11, 4, padding_idx=2), _tokens),
    "transposed": Kind(lambda: _with_bias(Conv1D(10, 6)), lambda rows: torch.randn(rows, 5, 6)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), _maps(3)),
    "conv2d circular": Kind(lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), _maps(4)),
    "conv2d same": Kind(lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, bias=False), _maps(4)),
}


def _with_bias(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.get_parameter("bias"))  # Conv1D starts at zero, which would hide a bias left out
    return layer


def one_layer(kind: str) -> OneLayer:
    return OneLayer(KINDS[kind].make())


class Tower(nn.Module):
    """Two numbered blocks and a head over tokens: enough structure for targets, ties and heads."""

    def __init__(self, width: int = 8, vocabulary: int = 13, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def tokens_for(rows: int = ROWS, length: int = 6, vocabulary: int = 13) -> Tensor:
    return torch.randint(0, vocabulary, (rows, length))


class AddedPrompt(ModelPart):
    """A trained vector added to every token's embedding."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width, dtype=dtype))

    def install(self, model: nn.Module) -> Sequence[RemovableHandle]:
        return [model.get_submodule("embed").register_forward_hook(self.add)]

    def add(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        strength = self.strength()
        return out if strength == 0.0 else out + strength * self.vector.to(out.dtype)


class SoftPrompt(Method):
    """A method without a layer: what it trains acts on the model as a whole."""

    name = "soft-prompt"
    width: int = 8

    def needs_sites(self) -> bool:
        return False

    def build(
        self, model: nn.Module, sites: Sequence[Site], generator: torch.Generator, dtype: torch.dtype
    ) -> AdapterParts:
        return AdapterParts({}, {"prompt": AddedPrompt(self.width, dtype)})


def train_some_steps(model: nn.Module, handle: Handle, inputs: Tensor, name: str | None = None, steps: int = 4) -> None:
    """Train what acts on a random goal, as a user's own loop would; then evaluation mode again."""
    optimizer = torch.optim.AdamW(handle.parameters(name).values(), lr=0.05, weight_decay=0.1)
    model.train()
    goal = torch.randn_like(model(inputs).detach().float())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs).float() - goal).square().mean().backward()
        optimizer.step()
    model.eval()


def fill_with_noise(handle: Handle, name: str | None = None, size: float = 0.2) -> None:
    """Give an adapter values as if trained: every tensor moves from where it started."""
    with torch.no_grad():
        for parameter in handle.parameters(name).values():
            parameter.add_(size * torch.randn_like(parameter))
