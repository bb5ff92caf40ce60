"""One trained adapter per model, shared by the tests of that model, and what peft says about itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import Handle

from .models import ZOO, batch, build, logits

# The first step lowers every loss, by 1 % in the slowest model (the LSTM). Six take 11 % off there, 40 % off most.
STEPS = 6
LEARNING_RATE = 0.03


@dataclass(frozen=True)
class Trained:
    """A model of the zoo with an adapter that was trained some steps on its one batch.

    Attributes:
        name: the model's name in the zoo.
        handle: the adapter on it.
        inputs: the batch.
        losses: of the batch before and after.
        digests: of the base, before and after.
        out: its logits.
    """

    name: str
    handle: Handle
    inputs: dict[str, Any]
    losses: tuple[float, float]
    digests: tuple[str, str]
    out: Tensor

    @property
    def model(self) -> nn.Module:
        return self.handle.model


@pytest.fixture(scope="module", params=ZOO)
def trained(request: pytest.FixtureRequest) -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return train(request.param)


def train(name: str) -> Trained:
    """Attach LoRA with another alpha than its rank and train it as a user's own loop would."""
    model, inputs = build(name), batch(name)
    handle = lk.attach(model, lk.LoRA(rank=2, alpha=3), ZOO[name].targets)
    digest, loss = handle.digest(), loss_of(model, inputs)
    optimizer = torch.optim.AdamW(handle.parameters().values(), lr=LEARNING_RATE)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        optimizer.step()
    model.eval()
    losses, digests = (loss, loss_of(model, inputs)), (digest, handle.digest())
    return Trained(name, handle, inputs, losses, digests, logits(model, inputs))


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> float:
    with torch.no_grad():
        return float(model(**inputs)["loss"])


@pytest.fixture(scope="module")
def saved(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the trained adapter."""
    from lorakit.formats import save_adapter

    folder = tmp_path_factory.mktemp(trained.name)
    save_adapter(trained.handle, folder, force=True)
    return folder


@pytest.fixture(autouse=True)
def only_known_warnings() -> Iterator[None]:
    """Let pass what PEFT and transformers say about themselves; anything else stays an error."""
    with warnings.catch_warnings():
        # transformers 5 renamed the attribute that PEFT reads.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # PEFT corrects fan_in_fan_out per layer in models that have both kinds, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield
