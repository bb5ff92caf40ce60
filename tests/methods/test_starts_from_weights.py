"""PiSSA, MiLoRA, OLoRA and the orthogonal start: what the pair is at the start, on real layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle
from lorakit.errors import ConfigError, UnsupportedLayerError
from lorakit.inits import find_init
from lorakit.inits.milora import MiLoRA
from lorakit.inits.olora import OLoRA
from lorakit.inits.orthogonal import Orthogonal, orthonormal
from lorakit.inits.pissa import PiSSA
from lorakit.inits.svd import top_directions
from lorakit.layers import Site
from lorakit.methods.lora import LowRankUpdate

# fp32 decompositions of small matrices, against fp64.
FP32 = 1e-5

D_OUT, D_IN, RANK, ALPHA = 40, 64, 4, 6.0


def falling(d_out: int = D_OUT, d_in: int = D_IN, seed: int = 0) -> Tensor:
    """Return a weight whose singular values are ``3 / i``."""
    generator = torch.Generator().manual_seed(seed)
    size = min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in (d_out, d_in))
    return (left * (3.0 / torch.arange(1, size + 1))) @ right.T


def layer(W: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(W)
    return model.to(dtype)


def start(init: object, W: Tensor | None = None, scaling: str = "standard", **more: object) -> tuple[Tensor, Tensor]:
    """Return ``s B A`` of the start in fp64, and the factor B."""
    W = falling() if W is None else W
    handle = lk.attach(layer(W), lk.LoRA(rank=RANK, alpha=ALPHA, init=init, scaling=scaling), "0", **more)
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    A, B = (update.A0, update.B0) if update.A0 is not None else (update.A.detach(), update.B.detach())
    assert A is not None
    assert B is not None
    return update.scale * B.double() @ A.double(), B


def part(W: Tensor, first: int, last: int) -> Tensor:
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, first:last] * S[first:last]) @ V[first:last]


each_scaling = pytest.mark.parametrize("scaling", ["standard", "rslora"])


# What the pair is -----------------------------------------------------------------------------------


@each_scaling
def test_pissa_starts_as_the_principal_part(scaling: str) -> None:
    found, _ = start(PiSSA(), scaling=scaling)
    torch.testing.assert_close(found, part(falling(), 0, RANK), rtol=0, atol=FP32)


@each_scaling
def test_milora_starts_as_the_minor_part(scaling: str) -> None:
    found, _ = start(MiLoRA(), scaling=scaling)
    torch.testing.assert_close(found, part(falling(), D_OUT - RANK, D_OUT), rtol=0, atol=FP32)


@each_scaling
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_olora_starts_as_the_first_part_of_the_whole_decomposition(scaling: str, shape: tuple[int, int]) -> None:
    W = falling(*shape)
    found, B = start(OLoRA(), W, scaling=scaling)
    Q, R = torch.linalg.qr(W.double())
    torch.testing.assert_close(found, Q[:, :RANK] @ R[:RANK], rtol=0, atol=FP32)
    gram = B.double().T @ B.double()
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(RANK).double(), rtol=0, atol=FP32)


@pytest.mark.parametrize("init", [PiSSA(), MiLoRA()], ids=lambda init: init.name)
def test_both_factors_are_of_one_size(init: object) -> None:
    handle = lk.attach(layer(falling()), lk.LoRA(rank=RANK, alpha=ALPHA, init=init), "0")
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    assert update.A0 is not None
    assert update.B0 is not None
    torch.testing.assert_close(update.A0.norm(dim=1), update.B0.norm(dim=0), rtol=FP32, atol=0)


def test_a_stack_starts_matrix_by_matrix() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.stack([falling(10, 8, seed) for seed in range(3)]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->beo", self.weight, x)

    model = nn.Sequential(Experts())
    update = lk.attach(model, lk.LoRA(rank=3, alpha=ALPHA, init="pissa"), "0.weight").updates()["0.weight"]
    assert isinstance(update, LowRankUpdate)
    W = Site.at(model, "0.weight").matrix()
    for expert in range(3):
        found = update.scale * update.B0[expert].double() @ update.A0[expert].double()
        torch.testing.assert_close(found, part(W[expert], 0, 3), rtol=0, atol=FP32)


# The fast decomposition -----------------------------------------------------------------------------


def test_a_few_krylov_steps_are_the_principal_part() -> None:
    W = falling(300, 200)
    found, _ = start(PiSSA(steps=4), W)
    exact = part(W, 0, RANK)
    assert (found - exact).norm() < 1e-4 * exact.norm()


def test_more_steps_are_closer() -> None:
    W = torch.randn(300, 200)
    exact = part(W, 0, RANK)
    errors = [float((start(PiSSA(steps=steps), W, seed=0)[0] - exact).norm()) for steps in (0, 1, 3, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_the_fast_start_is_the_seeds() -> None:
    W = torch.randn(300, 200)
    first, again, other = (start(PiSSA(steps=1), W, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_reports_directions_are_always_the_same() -> None:
    W = torch.randn(300, 200)
    torch.manual_seed(1)
    first = top_directions(W, 4).values
    torch.manual_seed(2)
    assert torch.equal(top_directions(W, 4).values, first)


@pytest.mark.parametrize("steps", [-1, 1.0, "4", True])
def test_steps_are_a_whole_number(steps: object) -> None:
    with pytest.raises(ConfigError, match="steps"):
        PiSSA(steps=steps)


def test_an_init_with_settings_is_read_back() -> None:
    method = lk.LoRA(init={"name": "pissa", "steps": 4})
    assert method.init == PiSSA(steps=4)
    assert find_init(method.summary()["init"]) == PiSSA(steps=4)


# Weights that have no directions --------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "milora", "olora"])
@pytest.mark.parametrize(
    ("fill", "message"), [(0.0, "its weight is zero"), (math.nan, "not finite"), (math.inf, "not finite")]
)
def test_a_weight_without_directions_is_refused_by_name(init: str, fill: float, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        model[1].weight.fill_(fill)
    with pytest.raises(UnsupportedLayerError, match=f"'{init}' cannot start at '1'.*{message}"):
        lk.attach(model, lk.LoRA(rank=2, init=init), ["0", "1"])
    assert lk.handle_of(model) is None


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_every_component_learns_where_the_weight_has_fewer_directions(init: str) -> None:
    model = layer(part(falling(), 0, 2).float())  # rank 2, below that of the pair
    handle = lk.attach(model, lk.LoRA(rank=RANK, alpha=ALPHA, init=init), "0")
    model(torch.randn(80, D_IN)).square().mean().backward()
    grads = {name: p.grad for name, p in handle.parameters().items()}
    assert all(grad is not None for grad in grads.values())
    sizes = torch.stack([grads["0.A"].norm(dim=1), grads["0.B"].norm(dim=0)])
    assert (sizes > 1e-6).all()


# The orthogonal start -------------------------------------------------------------------------------


def factors(handle: Handle) -> tuple[Tensor, Tensor]:
    return tuple(handle.parameters()[f"0.{name}"].detach() for name in "AB")  # type: ignore[return-value]


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_the_orthogonal_start_has_an_exactly_zero_product_of_live_halves(rank: int) -> None:
    A, B = factors(lk.attach(layer(falling()), lk.LoRA(rank=rank, init=Orthogonal()), "0"))
    half = rank - rank // 2
    assert torch.equal(B @ A, torch.zeros(D_OUT, D_IN))
    torch.testing.assert_close(A[:half] @ A[:half].T, torch.eye(half) / 3, rtol=0, atol=FP32)
    live = B[:, half:].T @ B[:, half:]
    torch.testing.assert_close(live, torch.eye(rank - half) / 3, rtol=0, atol=FP32)


def test_its_rows_are_as_long_as_those_of_the_kaiming_start() -> None:
    kaiming = torch.stack([factors(lk.attach(layer(falling()), lk.LoRA(rank=8), "0"))[0] for _ in range(40)])
    A, _ = factors(lk.attach(layer(falling()), lk.LoRA(rank=8, init="orthogonal"), "0"))
    assert float(A[0].norm()) == pytest.approx(float(kaiming.norm(dim=-1).mean()), rel=0.05)


def test_an_embeddings_table_starts_at_zero() -> None:
    model = nn.Sequential(nn.Embedding(50, 16))
    A, B = factors(lk.attach(model, lk.LoRA(rank=4, init="orthogonal"), "0"))
    assert torch.equal(A, torch.zeros(4, 50))
    torch.testing.assert_close(B.T @ B, 16.0 * torch.eye(4), rtol=0, atol=1e-4)


def test_orthonormal_columns_are_spread_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([orthonormal((), 3, 2, generator) for _ in range(4000)])
    # A uniform direction has the mean 0 and the variance 1 / 3; 4000 draws leave a deviation of 0.009.
    assert drawn.mean(dim=0).abs().max() < 0.04
    assert (drawn.square().mean(dim=0) - 1 / 3).abs().max() < 0.03


# In training ----------------------------------------------------------------------------------------


def test_small_steps_survive_in_bf16_where_the_factors_themselves_would_lose_them() -> None:
    W = falling()
    handle = lk.attach(layer(W), lk.LoRA(rank=RANK, alpha=ALPHA, init="pissa"), "0", dtype=torch.bfloat16)
    update = handle.updates()["0"]
    assert isinstance(update, LowRankUpdate)
    A0, B0 = update.A0.clone(), update.B0.clone()
    step = 1e-4 * torch.randn(RANK, D_IN)
    with torch.no_grad():
        update.A.add_(step)
    expected = update.scale * B0.double() @ step.double()
    naive = update.scale * (B0.double() @ (A0 + step.bfloat16()).double() - B0.double() @ A0.double())
    assert (handle.delta("0").double() - expected).norm() < 0.01 * expected.norm()
    assert (naive - expected).norm() > 0.5 * expected.norm()


def test_dora_with_pissa_starts_at_the_base_and_learns_magnitudes() -> None:
    model, x = layer(falling()), torch.randn(5, D_IN)
    before = model(x).detach()
    handle = lk.attach(model, lk.DoRA(rank=RANK, alpha=ALPHA, init=PiSSA()), "0")
    with torch.no_grad():
        assert torch.equal(model(x), before)
        handle.parameters()["0.magnitude"].mul_(2.0)
        bias = model[0].bias
        torch.testing.assert_close(model(x) - bias, 2.0 * (before - bias))
