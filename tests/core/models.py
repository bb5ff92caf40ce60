"""Small models and methods that the tests of the core share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import Handle, attach, handle_of
from lorakit.adapters.targets import find_sites
from lorakit.errors import UnsupportedLayerError
from lorakit.layers import BranchOps, Site
from lorakit.methods import AdapterParts, Method, ModelPart, find_method, method_names

ROWS = 4
# Fields for methods that do not take a rank and an alpha; alpha != rank, so that a scale left out shows.
RANK, ALPHA = 3, 5.0
SETTINGS: dict[str, dict[str, object]] = {"vera": {"rank": RANK}}


def method_named(name: str, **fields: object) -> Method:
    return find_method(name, **{**SETTINGS.get(name, {"rank": RANK, "alpha": ALPHA}), **fields})


METHODS = [name for name in method_names() if find_method(name).needs_sites()]


class OneLayer(nn.Module):
    """A model of one layer, since the root of a model is never a target; batch first, one tensor out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OneAttention(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        key = x[..., : self.layer.kdim]
        value = x[..., : self.layer.vdim]
        out, weights = self.layer(x, key, value)
        out = out if self.layer.batch_first else out.transpose(0, 1)
        return torch.cat([out.flatten(1), weights.flatten(1)], dim=1)


class OneRecurrent(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out, states = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        out = out if self.layer.batch_first else out.transpose(0, 1)
        last = states if isinstance(states, Tensor) else torch.cat(states, dim=2)
        return torch.cat([out.flatten(1), last.transpose(0, 1).flatten(1)], dim=1)


class OneCell(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        state = self.layer(x[:, 0])
        out = self.layer(x[:, 1], state)
        return out if isinstance(out, Tensor) else torch.cat(out, dim=1)


class OneBilinear(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., :3])


class OneExperts(OneLayer):
    """Routes as such models do: each row goes to two experts, chosen by its numbers alone."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x[:, : self.layer.num_experts].softmax(dim=1)
        weights, index = scores.topk(2, dim=1)
        return self.layer(x, index, weights)


@dataclass(frozen=True)
class Kind:
    """One kind of host layer: how to make it (never square) and an input of ``rows`` rows."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    model: Callable[[nn.Module], OneLayer] = OneLayer
    target: str = "layer"
    one_graph: bool = True  # whether the host alone, without an adapter, is one graph for torch.compile


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 11, (rows, 5))


def _maps(channels: int, *sizes: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, channels, *(sizes or (9, 8)))


def _vectors(*sizes: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *sizes)


def _scaled() -> nn.Module:
    return Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5)


def _experts(kind: type[nn.Module], config: type, **fields: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        # Multiples of 8: torch's grouped product takes rows of whole 16 bytes only, in half precision too.
        settings = config(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, **fields)
        settings._experts_implementation = "grouped_mm"
        layer = kind(settings)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        return layer

    return make


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 10), _vectors(5, 6)),
    "linear without bias": Kind(lambda: nn.Linear(7, 4, bias=False), _vectors(7)),
    "linear in parts": Kind(lambda: nn.Linear(6, 13), _vectors(5, 6), target="layer[0:4,8:13]"),
    "embedding": Kind(lambda: nn.Embedding(11, 6), _tokens),
    "embedding with padding": Kind(lambda: nn.Embedding(11, 4, padding_idx=2), _tokens),
    "embedding scaled": Kind(_scaled, _tokens),
    "transposed": Kind(lambda: _with_bias(Conv1D(10, 6)), _vectors(5, 6)),
    "transposed in parts": Kind(lambda: _with_bias(Conv1D(12, 6)), _vectors(5, 6), target="layer[0:4,8:12]"),
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), _maps(4, 9)),
    "conv1d groups": Kind(lambda: nn.Conv1d(4, 8, 3, groups=2, padding="valid"), _maps(4, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), _maps(3)),
    "conv2d circular": Kind(lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), _maps(4)),
    "conv2d same": Kind(lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, bias=False), _maps(4)),
    "conv2d groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), _maps(4)),
    "conv2d by depth": Kind(lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), _maps(4)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 5, (1, 3, 2), stride=(1, 2, 1), padding_mode="replicate"), _maps(2, 3, 7, 5)),
    "conv transpose 1d": Kind(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), _maps(4, 5)),
    "conv transpose 2d": Kind(
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, dilation=2), _maps(4, 5, 4)
    ),
    "conv transpose groups": Kind(
        lambda: nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2, output_padding=1), _maps(6, 5, 4)
    ),
    "conv transpose 3d": Kind(lambda: nn.ConvTranspose3d(3, 5, 2, stride=(1, 2, 1), bias=False), _maps(3, 2, 3, 2)),
    "attention": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), _vectors(5, 8), OneAttention, "layer.in_proj_weight"
    ),
    "attention in parts": Kind(
        lambda: nn.MultiheadAttention(8, 2), _vectors(5, 8), OneAttention, "layer.in_proj_weight[0:5,16:22]"
    ),
    "attention apart": Kind(
        lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True),
        _vectors(5, 8),
        OneAttention,
        "layer[k,v]",
    ),
    "lstm": Kind(lambda: nn.LSTM(5, 4, 2, bidirectional=True), _vectors(6, 5), OneRecurrent, one_graph=False),
    "lstm projected": Kind(
        lambda: nn.LSTM(5, 6, proj_size=3, batch_first=True), _vectors(6, 5), OneRecurrent, one_graph=False
    ),
    "gru": Kind(lambda: nn.GRU(5, 4, batch_first=True), _vectors(6, 5), OneRecurrent, one_graph=False),
    "lstm cell": Kind(lambda: nn.LSTMCell(5, 4), _vectors(2, 5), OneCell),
    "gru cell": Kind(lambda: nn.GRUCell(5, 4), _vectors(2, 5), OneCell),
    "bilinear": Kind(lambda: nn.Bilinear(5, 3, 4), _vectors(6, 5), OneBilinear),
    "experts": Kind(_experts(MixtralExperts, MixtralConfig), _vectors(8), OneExperts),
    "experts with biases": Kind(_experts(GptOssExperts, GptOssConfig), _vectors(8), OneExperts),
}


def sites_of_kind(model: nn.Module, kind: str) -> list[Site]:
    """Return the sites that a kind's target means, on a model of :func:`one_layer`, adapted or not."""
    return find_sites(model, KINDS[kind].target)


def float_inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _with_bias(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.get_parameter("bias"))  # Conv1D starts at zero, which would hide a bias left out
    return layer


def one_layer(kind: str, dtype: torch.dtype = torch.float32) -> OneLayer:
    """Return a frozen model: torch chooses other kernels for attention and recurrent layers that are trained."""
    model = KINDS[kind].model(KINDS[kind].make()).requires_grad_(False).to(dtype)
    if dtype == torch.float64 and KINDS[kind].model is OneExperts:
        model.layer.config._experts_implementation = "eager"  # torch's grouped product has no kernel for fp64
    return model


# Kinds whose update is a product beside the layer, and kinds that run with other weights.
BRANCHES = [kind for kind in KINDS if isinstance(sites_of_kind(one_layer(kind), kind)[0].ops, BranchOps)]
WEIGHTS = [kind for kind in KINDS if kind not in BRANCHES]


# A kind of each family: enough for a method whose updates are another's.
FAMILIES = ["linear", "linear in parts", "transposed", "embedding", "conv2d", "attention", "lstm", "experts"]


def refusal(method: str, kind: str) -> str | None:
    """Return why a method refuses a kind of layer by name, or None where it acts on it."""
    model = one_layer(kind)
    try:
        method_named(method).check(sites_of_kind(model, kind))
    except UnsupportedLayerError as error:
        return str(error)
    return None


def _computing(method: str) -> object:
    """Return what a method's updates compute and keep, as functions."""
    update = next(iter(attach(one_layer("linear"), method_named(method), "layer").updates().values()))
    return type(update).terms, type(update).tensors, type(update).load


def _cells() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return which methods are tried on which kinds, and which of them are refused."""
    tried: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    known: list[object] = []
    for method in sorted(METHODS, key=lambda name: (name != "lora", name)):
        new = _computing(method) not in known
        known.append(_computing(method))
        for kind in KINDS if new else FAMILIES:
            (tried if refusal(method, kind) is None else refused).append((method, kind))
    return tried, refused


CELLS, REFUSED = _cells()
# Methods that act on every kind of layer, one for each way of computing.
WHOLE = [method for method in METHODS if all((method, kind) in CELLS for kind in KINDS)]


def cells_of(kinds: Iterable[str]) -> list[tuple[str, str]]:
    """Return methods with these kinds: the plain ones with all, the others with one of each family."""
    plain = ("lora", "dora")
    return [(method, kind) for method, kind in CELLS if kind in kinds and (method in plain or kind in FAMILIES)]


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
        self,
        model: nn.Module,
        sites: Sequence[Site],
        generator: torch.Generator,
        dtype: torch.dtype,
        seen: Mapping[str, object] = MappingProxyType({}),
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


def pickled(model: nn.Module) -> nn.Module:
    copied = pickle.loads(pickle.dumps(model))
    assert isinstance(copied, nn.Module)
    return copied


def dense_twin(model: nn.Module, handle: Handle) -> nn.Module:
    """Return a plain copy of the base that holds ``W + delta`` in the place of every weight that has an update."""
    twin = copy.deepcopy(model)
    own = handle_of(twin)
    assert own is not None
    own.detach()
    with torch.no_grad():
        for site in (Site.at(model, path) for path in handle.updates()):
            change = site.ops.as_weight(site.layer, handle.delta(site.path))
            twin.get_parameter(f"{site.host}.{site.ops.parameter}").add_(change)
    return twin


def fill_with_noise(handle: Handle, name: str | None = None, size: float = 0.2) -> None:
    """Give an adapter values as if trained: every tensor moves from where it started."""
    with torch.no_grad():
        for parameter in handle.parameters(name).values():
            parameter.add_(size * torch.randn_like(parameter))
