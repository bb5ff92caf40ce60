"""LoRA-Pro: its gradients make the step nearest to the weight's own, and stay nearest to LoRA's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lorakit as lk
from lorakit.adapters import handle_of
from lorakit.layers import Site
from lorakit.methods.lora import LoRA, LowRankUpdate
from lorakit.methods.lorafa import LoRAFA
from lorakit.methods.lorapro import LoRAPro
from lorakit.training.optimizers import optimizer_for

RANK = 3
METHOD = LoRAPro(rank=RANK, alpha=5)
# The gradients that are combined are fp32, a few ulps each, and the ridge is 1e-8 of the mean eigenvalue.
SAME_STEP = 1e-5


class Alone(nn.Module):
    """One layer and, for experts, the routing of its rows by their own numbers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, MixtralExperts):
            out = self.layer(x)
            return out if isinstance(out, Tensor) else out[0]
        weights, index = x[:, :4].softmax(dim=1).topk(2, dim=1)
        return self.layer(x, index, weights)


def experts() -> MixtralExperts:
    config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    layer = MixtralExperts(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...], str]] = {
    "linear": (nn.Linear, (12, 20), "layer"),
    "embedding": (nn.Embedding, (17, 12), "layer"),
    "convolution": (nn.Conv2d, (4, 6, 3), "layer"),
    "recurrent": (nn.LSTM, (5, 4), "layer.weight_ih_l0"),
    "experts": (nn.Module, (), "layer.gate_up_proj"),
}


def model_of(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    make, sizes, _ = KINDS[kind]
    inputs = {
        "linear": torch.randn(10, 12),
        "embedding": torch.randint(0, 17, (30,)),
        "convolution": torch.randn(2, 4, 6, 5),
        "recurrent": torch.randn(6, 4, 5),
        "experts": torch.randn(40, 8),
    }
    return Alone(experts() if kind == "experts" else make(*sizes)), inputs[kind]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean()


def attached(kind: str, method: LoRA = METHOD, moves: float = 0.3) -> tuple[lk.Handle, Tensor]:
    """Return an adapter in the middle of a run: both factors have moved."""
    model, x = model_of(kind)
    handle = lk.attach(model, method, KINDS[kind][2], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(moves * torch.randn_like(parameter))
    return handle, x


def pair_of(handle: lk.Handle) -> tuple[Tensor, Tensor, LowRankUpdate]:
    """Return the factors whose gradients the parameters have, in fp64, and the update."""
    (update,) = handle.updates().values()
    assert isinstance(update, LowRankUpdate)
    A = update.A if update.A0 is None else update.A0 + update.A
    B = update.B if update.B0 is None else update.B0 + update.B
    return A.detach().double(), B.detach().double(), update


def weight_gradient(handle: lk.Handle, x: Tensor) -> Tensor:
    """Return the gradient of the updated weight as matrices in fp64, from a plain twin of the model."""
    (path,) = handle.updates()
    change = handle.delta(path)
    twin = copy.deepcopy(handle.model)
    own = handle_of(twin)
    assert own is not None
    site = Site.at(own.detach(), path)
    weight = site.ops.weight(site.layer)
    with torch.no_grad():
        weight.add_(site.ops.as_weight(site.layer, change))
    weight.requires_grad_(True)
    loss_of(twin, x).backward()
    assert weight.grad is not None
    return site.ops.as_matrix(site.layer, weight.grad).double()


def projection(columns: Tensor) -> Tensor:
    Q = torch.linalg.qr(columns).Q
    return Q @ Q.mT


def plain_gradients(handle: lk.Handle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return LoRA's own gradients of A and B, in fp64."""
    for parameter in handle.parameters().values():
        parameter.grad = None
    loss_of(handle.model, x).backward()
    _, _, update = pair_of(handle)
    assert update.A.grad is not None
    assert update.B.grad is not None
    return update.A.grad.double(), update.B.grad.double()


def adjusted_gradients(handle: lk.Handle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients that the optimizer gets, in fp64."""
    plain_gradients(handle, x)
    METHOD.rule(handle.updates(), 1).before_step(1)
    _, _, update = pair_of(handle)
    assert update.A.grad is not None
    assert update.B.grad is not None
    return update.A.grad.double(), update.B.grad.double()


def change_of(handle: lk.Handle, gradients: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``s (B g^A + g^B A)``."""
    A, B, update = pair_of(handle)
    return update.scale * (B @ gradients[0] + gradients[1] @ A)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "recurrent", "experts"])
def test_the_step_is_the_projection_of_the_weights_gradient(kind: str, init: str) -> None:
    handle, x = attached(kind, METHOD.replaced(init=init))
    A, B, _ = pair_of(handle)
    G, P_A, P_B = weight_gradient(handle, x), projection(A.mT), projection(B)
    expected = P_B @ G + (G - P_B @ G) @ P_A
    found = change_of(handle, adjusted_gradients(handle, x))
    assert (found - expected).norm() <= SAME_STEP * expected.norm()


def test_an_embeddings_step_is_the_projection_too() -> None:
    handle, x = attached("embedding")
    A, B, _ = pair_of(handle)
    G, P_A, P_B = weight_gradient(handle, x), projection(A.mT), projection(B)
    expected = P_B @ G + (G - P_B @ G) @ P_A
    found = change_of(handle, adjusted_gradients(handle, x))
    assert (found - expected).norm() <= SAME_STEP * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_its_cosine_to_the_weights_gradient_is_not_below_loras(kind: str) -> None:
    handle, x = attached(kind)
    G = weight_gradient(handle, x)
    plain = change_of(handle, plain_gradients(handle, x))
    found = change_of(handle, adjusted_gradients(handle, x))
    assert (found * G).sum() / found.norm() >= (plain * G).sum() / plain.norm()


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_of_all_pairs_with_this_step_it_is_the_nearest_to_loras_gradients(kind: str) -> None:
    handle, x = attached(kind)
    A, B, _ = pair_of(handle)
    plain_A, plain_B = plain_gradients(handle, x)
    found_A, found_B = adjusted_gradients(handle, x)
    # Other pairs with the same step are (g^A + Y A, g^B - B Y); the distance has no slope in Y at the nearest.
    slope = (found_A - plain_A) @ A.mT - B.mT @ (found_B - plain_B)
    size = (found_A - plain_A).norm() * A.norm() + (found_B - plain_B).norm() * B.norm()
    assert slope.norm() <= SAME_STEP * size


def test_the_first_step_is_that_of_lorafa() -> None:
    handle, x = attached("linear", moves=0.0)
    A, B = adjusted_gradients(handle, x)
    model, x = model_of("linear")
    frozen = lk.attach(model, LoRAFA(rank=RANK, alpha=5), "layer", seed=1)
    loss_of(model, x).backward()
    frozen.entry("default").method.rule(frozen.updates(), 1).before_step(1)
    (expected,) = (p.grad for p in frozen.parameters().values())
    assert expected is not None
    assert torch.equal(A, torch.zeros_like(A))
    assert (B - expected).norm() <= SAME_STEP * expected.norm()


def test_an_embedding_starts_with_finite_gradients_of_the_factor_that_is_zero() -> None:
    handle, x = attached("embedding", moves=0.0)
    A, B = adjusted_gradients(handle, x)
    assert A.isfinite().all()
    assert A.abs().max() > 0
    assert torch.equal(B, torch.zeros_like(B))


def test_pairs_of_several_ranks_and_stacks_are_solved_apart() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(20, 6)
    handle = lk.attach(model, METHOD.replaced(rank_pattern={"2": 2}), ["0", "2", "4"])
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model(x).square().mean().backward()
    alone = {path: copy.deepcopy(update) for path, update in handle.updates().items()}
    for path, update in alone.items():
        for name, parameter in handle.updates()[path].named_parameters():
            update.get_parameter(name).grad = parameter.grad.clone() if parameter.grad is not None else None
        METHOD.rule({path: update}, 1).before_step(1)
    METHOD.rule(handle.updates(), 1).before_step(1)
    found = {name: p.grad for name, p in handle.parameters().items()}
    expected = {f"{path}.{n}": p.grad for path, update in alone.items() for n, p in update.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=0)


def test_a_pair_that_no_loss_reaches_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    handle = lk.attach(model, METHOD, ["0", "1"])
    model[1](torch.randn(5, 10)).square().mean().backward()
    METHOD.rule(handle.updates(), 1).before_step(1)
    assert all((p.grad is None) == name.startswith("0.") for name, p in handle.parameters().items())


def test_the_optimizer_remembers_as_many_numbers_as_loras() -> None:
    handle, x = attached("linear")
    rule = METHOD.rule(handle.updates(), 1)
    optimizer = optimizer_for(rule, handle.parameters(), "adamw", 1e-3, 0.0)
    loss_of(handle.model, x).backward()
    rule.before_step(1)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert sum(value.numel() for value in held) == 2 * RANK * (12 + 20)
    assert rule.state() == {}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_lowers_the_loss(kind: str) -> None:
    handle, x = attached("linear", moves=0.0)
    rule = METHOD.rule(handle.updates(), 30)
    optimizer = optimizer_for(rule, handle.parameters(), kind, 0.02, 0.0)
    losses = []
    for step in range(1, 31):
        optimizer.zero_grad()
        loss = loss_of(handle.model, x)
        loss.backward()
        rule.before_step(step)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_peft_reads_the_same_outputs(init: str, tmp_path: Path) -> None:
    handle, x = attached("linear", METHOD.replaced(init=init))
    lk.save(handle, tmp_path)
    theirs = PeftModel.from_pretrained(model_of("linear")[0], str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), handle.model(x), rtol=0, atol=1e-5)  # fp32 sums over 12 terms


def test_a_loaded_adapter_trains_on_with_the_same_gradients(tmp_path: Path) -> None:
    handle, x = attached("linear")
    lk.save(handle, tmp_path)
    again = lk.load(model_of("linear")[0], tmp_path, trainable=True)
    assert again.entry("default").method == METHOD
    for found, expected in zip(adjusted_gradients(again, x), adjusted_gradients(handle, x), strict=True):
        assert torch.equal(found, expected)
