"""LoRA-FA: what it keeps for the backward pass, and that its step is the nearest to the weight's gradient."""

from __future__ import annotations

import copy

import torch
from experiments.gate import Found, Gate
from experiments.stepping import Planted, gradients, projection, relative, train, weight_gradient
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.lorafa import LoRAFAUpdate

SOURCE = "Zhang et al. 2023, arXiv 2308.03303"
RANK, TOKENS, LAYERS = 8, 96, 3
RATES, STEPS = tuple(1e-4 * 10 ** (i / 3) for i in range(9)), 40


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of all storages that one forward pass keeps for the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_beside_the_base(seed: int) -> Found:
    """Return the bytes kept per layer beside the base's own, in units of ``tokens * rank * 4``."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(192, 160), nn.ReLU(), nn.Linear(160, 192)) for _ in range(LAYERS)]
    base = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(TOKENS, 192, requires_grad=True)
    found = {}
    for name in ("lora", "lorafa"):
        model = copy.deepcopy(base)
        before = kept_bytes(model, x)
        lk.attach(model, {"name": name, "rank": RANK, "alpha": 12}, seed=seed)
        found[name] = (kept_bytes(model, x) - before) / (2 * LAYERS * TOKENS * RANK * 4)
    return Found(found["lorafa"], {"LoRA": found["lora"]})


def distance_from_the_minimiser(seed: int) -> Found:
    """Return how far ``s g A`` is from G projected onto A's rows, with the gradient that the optimizer gets."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 56), nn.Tanh(), nn.Linear(56, 12))
    x, goal = torch.randn(64, 40), torch.randn(64, 12)

    def loss(model: nn.Module) -> Tensor:
        return (model(x) - goal).square().mean()

    handle = lk.attach(model, lk.LoRAFA(rank=6, alpha=15), "0", seed=seed)
    rule = train(handle, loss, 5, 1e-2)
    G = weight_gradient(handle, "0", loss)
    gradients(handle, loss)
    update = handle.updates()["0"]
    assert isinstance(update, LoRAFAUpdate)
    A = update.A.double()
    plain = _step(update, A)
    rule.before_step(6)
    nearest = G @ projection(A.mT)
    return Found(relative(_step(update, A), nearest), {"uncorrected": relative(plain, nearest)})


def _step(update: LoRAFAUpdate, A: Tensor) -> Tensor:
    assert update.B.grad is not None
    return update.scale * update.B.grad.double() @ A


def best_error(seed: int) -> Found:
    """Return LoRA-FA's best final error in units of LoRA's at one rank, each at the best of the same rates."""
    planted = Planted(seed)
    methods = {
        "LoRA": lk.LoRA(rank=16, alpha=24),
        "LoRA-FA": lk.LoRAFA(rank=16, alpha=24),
        "LoRA-FA, uncorrected": lk.LoRAFA(rank=16, alpha=24, corrected=False),
    }
    best = {name: min(planted.error(method, lr, STEPS) for lr in RATES) for name, method in methods.items()}
    beside = {f"error of {name}": error for name, error in best.items()}
    return Found(best["LoRA-FA"] / best["LoRA"], {**beside, "no update of this rank is below": planted.floor(16)})


GATES = [
    Gate(
        "lorafa",
        "A linear layer keeps no more than tokens x rank x 4 bytes for the backward pass beside the base's own.",
        "<= 1 in units of tokens x rank x 4 bytes a layer",
        kept_beside_the_base,
        lambda value: value <= 1,
        source=SOURCE,
    ),
    Gate(
        "lorafa",
        "The corrected step s g A is the minimiser of ||s g A - G||_F, which is G projected onto A's rows (five steps "
        "into a run).",
        "relative distance <= 1e-5",
        distance_from_the_minimiser,
        lambda value: value <= 1e-5,
        source=f"{SOURCE}, second version",
    ),
    Gate(
        "lorafa",
        f"Best final error in units of LoRA's at one rank, each at the best of {len(RATES)} rates (planted change, "
        f"{STEPS} steps of AdamW): A's rows are random, and what lies beside them cannot be learnt.",
        "reported",
        best_error,
        None,
        source=SOURCE,
    ),
]
