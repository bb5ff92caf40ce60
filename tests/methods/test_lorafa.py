"""LoRA-FA: what is frozen, what is kept for the backward pass, and the corrected gradient."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapters import handle_of
from lorakit.layers import Site
from lorakit.methods.lora import LoRA
from lorakit.methods.lorafa import LoRAFA, LoRAFAUpdate

RANK, TOKENS = 3, 10
METHOD = LoRAFA(rank=RANK, alpha=5)
# The gradient is fp32, whatever is solved in fp64: a few ulps of the sum over ten tokens.
SAME_STEP = 1e-5


class Looked(nn.Module):
    """An embedding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(17, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)


class Alone(nn.Module):
    """One layer, since the root of a model is never a target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model_of(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    if kind == "embedding":
        return Looked(), torch.randint(0, 17, (TOKENS,))
    if kind == "convolution":
        return Alone(nn.Conv2d(4, 6, (3, 2))), torch.randn(2, 4, 6, 5)
    layer = nn.Linear(12, 20) if kind == "linear" else Conv1D(20, 12)
    return Alone(layer), torch.randn(TOKENS, 12)


KINDS = ["linear", "transposed", "embedding", "convolution"]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean()


def weight_gradient(handle: lk.Handle, x: Tensor) -> Tensor:
    """Return the gradient of the updated weight as a matrix, from a plain twin of the model."""
    change = handle.delta("layer")
    twin = copy.deepcopy(handle.model)
    own = handle_of(twin)
    assert own is not None
    site = Site.at(own.detach(), "layer")
    weight = site.ops.weight(site.layer)
    with torch.no_grad():
        weight.add_(site.ops.as_weight(site.layer, change))
    weight.requires_grad_(True)
    loss_of(twin, x).backward()
    assert weight.grad is not None
    return site.ops.as_matrix(site.layer, weight.grad)


def update_of(handle: lk.Handle) -> LoRAFAUpdate:
    update = handle.updates()["layer"]
    assert isinstance(update, LoRAFAUpdate)
    return update


def moved(handle: lk.Handle, size: float = 0.3) -> lk.Handle:
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(size * torch.randn_like(parameter))
    return handle


def gradient_of(handle: lk.Handle, x: Tensor) -> Tensor:
    """Return the trained factor's gradient as the optimizer gets it."""
    for parameter in handle.parameters().values():
        parameter.grad = None
    loss_of(handle.model, x).backward()
    handle.entry("default").method.rule(handle.updates(), 1).before_step(1)
    gradient = update_of(handle).trained.grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_nearest_to_the_weights_gradient(kind: str) -> None:
    model, x = model_of(kind)
    handle = moved(lk.attach(model, METHOD, "layer"))
    G, gradient, update = weight_gradient(handle, x), gradient_of(handle, x), update_of(handle)
    frozen = update.A if update.frozen == "A" else update.B.mT
    nearest = torch.linalg.lstsq(update.scale * frozen.mT, G.mT if update.frozen == "A" else G).solution
    expected = nearest.mT if update.frozen == "A" else nearest
    assert (gradient - expected).norm() <= SAME_STEP * expected.norm()


def test_each_matrix_of_a_stack_has_the_step_nearest_to_its_own_gradient() -> None:
    update = LoRAFAUpdate(torch.randn(4, RANK, 9), torch.randn(4, 7, RANK), 1.5, 0.0, None, False, "A")
    G = torch.randn(4, 7, 9)
    update.B.grad = 1.5 * G @ update.A.mT
    METHOD.rule({"layer": update}, 1).before_step(1)
    expected = torch.stack([torch.linalg.lstsq(1.5 * A.mT, g.mT).solution.mT for A, g in zip(update.A, G, strict=True)])
    assert (update.B.grad - expected).norm() <= SAME_STEP * expected.norm()


def test_uncorrected_it_is_loras_gradient() -> None:
    model, x = model_of("linear")
    handle = moved(lk.attach(model, METHOD.replaced(corrected=False), "layer"))
    G, update = weight_gradient(handle, x), update_of(handle)
    expected = update.scale * G @ update.A.mT
    assert (gradient_of(handle, x) - expected).norm() <= SAME_STEP * expected.norm()


@pytest.mark.parametrize(("kind", "trained"), [("linear", "B"), ("convolution", "B"), ("embedding", "A")])
def test_one_factor_is_trained(kind: str, trained: str) -> None:
    model, _ = model_of(kind)
    assert list(lk.attach(model, METHOD, "layer").parameters()) == [f"layer.{trained}"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_factor_is_not_zero_and_keeps_every_bit(kind: str) -> None:
    model, x = model_of(kind)
    handle = lk.attach(model, METHOD, "layer")
    before = handle.state().sites["layer"].tensors[update_of(handle).frozen]
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=0.1, weight_decay=0.5)
    loss_of(model, x).backward()
    optimizer.step()
    after = handle.state().sites["layer"].tensors[update_of(handle).frozen]
    assert before.abs().max() > 0
    assert torch.equal(after, before)


def test_the_models_state_holds_the_frozen_factor() -> None:
    model, _ = model_of("linear")
    lk.attach(model, METHOD, "layer")
    assert any(name.endswith(".A") for name in model.state_dict())


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of the storages kept for the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.train()(x).square()  # a next layer that keeps its input, as most do
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_beside_the_base(kind: str, method: LoRA) -> int:
    model, x = model_of(kind)
    if kind == "embedding":
        model.layer.weight.requires_grad_(True)  # as behind other layers: else the base keeps nothing at all
        before = kept_bytes(model, x)
    else:
        model.requires_grad_(False)
        x.requires_grad_(True)
        before = kept_bytes(model, x)
    lk.attach(model, method, "layer")
    return kept_bytes(model, x) - before


@pytest.mark.parametrize(
    ("kind", "positions"), [("linear", TOKENS), ("transposed", TOKENS), ("convolution", 2 * 4 * 4)]
)
def test_a_layer_keeps_rank_numbers_a_token(kind: str, positions: int) -> None:
    assert kept_beside_the_base(kind, METHOD) == positions * RANK * 4


def test_an_embedding_keeps_nothing() -> None:
    assert kept_beside_the_base("embedding", METHOD) == 0


def test_lora_keeps_the_input_as_well() -> None:
    assert kept_beside_the_base("linear", LoRA(rank=RANK, alpha=5)) == TOKENS * (RANK + 12) * 4


def test_dropout_keeps_no_mask() -> None:
    assert kept_beside_the_base("linear", METHOD.replaced(dropout=0.5)) == TOKENS * RANK * 4


@pytest.mark.parametrize("init", ["pissa", "olora", "milora"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_start_from_the_weight_keeps_the_function_and_the_rank(init: str, kind: str) -> None:
    model, x = model_of(kind)
    with torch.no_grad():
        before = model(x)
        handle = lk.attach(model, METHOD.replaced(init=init), "layer")
        assert torch.equal(model(x), before)
    assert handle.state().sites["layer"].tensors["A"].shape[0] == RANK


def test_a_start_from_the_weight_freezes_the_weights_own_directions() -> None:
    model, _ = model_of("linear")
    handle = lk.attach(model, METHOD.replaced(init="pissa"), "layer")
    V = torch.linalg.svd(model.layer.weight.detach()).Vh[:RANK]
    A = update_of(handle).A
    assert (A - A @ V.mT @ V).norm() <= 1e-4 * A.norm()  # an fp32 decomposition


def test_a_factor_without_any_direction_leaves_finite_gradients() -> None:
    model, x = model_of("linear")
    handle = lk.attach(model, METHOD, "layer")
    update_of(handle).A.zero_()
    assert torch.equal(gradient_of(handle, x), torch.zeros(20, RANK))


def test_the_rule_forgets_its_inverses_when_a_run_is_gone_on_with() -> None:
    model, x = model_of("linear")
    handle = moved(lk.attach(model, METHOD, "layer"))
    rule = METHOD.rule(handle.updates(), 4)
    loss_of(model, x).backward()
    rule.before_step(1)
    update_of(handle).A.mul_(2.0)
    rule.load({})
    for parameter in handle.parameters().values():
        parameter.grad = None
    loss_of(model, x).backward()
    rule.before_step(2)
    found = update_of(handle).trained.grad
    assert found is not None
    assert torch.equal(found, gradient_of(handle, x))


def test_its_numbers_are_those_of_the_trained_factor() -> None:
    model, _ = model_of("linear")
    assert lk.attach(model, METHOD, "layer").counts().trained == RANK * 20


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_peft_reads_the_same_outputs(kind: str, init: str, tmp_path: Path) -> None:
    model, x = model_of(kind)
    handle = moved(lk.attach(model, METHOD.replaced(init=init), "layer"))
    lk.save(handle, tmp_path)
    theirs = PeftModel.from_pretrained(model_of(kind)[0], str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)  # fp32 sums over 24 terms


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_loaded_adapter_trains_on_with_the_same_factor_frozen(kind: str, tmp_path: Path) -> None:
    model, x = model_of(kind)
    handle = moved(lk.attach(model, METHOD.replaced(init="kaiming"), "layer"))
    lk.save(handle, tmp_path)
    other = model_of(kind)[0]
    again = lk.load(other, tmp_path, trainable=True)
    assert list(again.parameters()) == list(handle.parameters())
    assert torch.equal(gradient_of(again, x), gradient_of(handle, x))
