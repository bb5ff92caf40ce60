"""Tiny real models of every kind of layer, with non-square layers, and adapters with random numbers in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Handle, attach
from lorakit.methods import Method

# Both sides add the same few products in fp32, in another order, on outputs of size about 1.
FP32_TOLERANCE = 1e-5

VOCABULARY = 29

# Large enough that every layer of so small a model moves its logits.
INITIALIZER_RANGE = 0.3


class ConvNet(nn.Module):
    """Two convolutions, with stride, padding and a kernel that is not square, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2))
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.second(torch.relu(self.first(image)))
        return self.classifier(self.norm(maps.mean((2, 3))))


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        max_position_embeddings=16,
        initializer_range=INITIALIZER_RANGE,
    )
    return BertForSequenceClassification(config), {"input_ids": torch.randint(0, VOCABULARY, (3, 7))}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=INITIALIZER_RANGE,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, VOCABULARY, (3, 7))}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=3,
        pad_token_id=0,
        initializer_range=INITIALIZER_RANGE,
    )
    return GPT2ForSequenceClassification(config), {"input_ids": torch.randint(1, VOCABULARY, (3, 7))}


def conv_net() -> tuple[nn.Module, dict[str, Tensor]]:
    return ConvNet(), {"image": torch.randn(2, 3, 9, 10)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "conv": conv_net,
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in evaluation mode, with the same weights each time, and an input for it."""
    torch.manual_seed(7)
    model, inputs = MODELS[name]()
    return model.eval(), inputs


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits."""
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


@torch.no_grad()
def shake(parameters: Any) -> None:
    """Move every parameter by noise, so that no part of an update is zero."""
    generator = torch.Generator().manual_seed(11)
    for parameter in parameters:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def shaken(model: nn.Module, method: Method, targets: Any, **options: Any) -> Handle:
    """Attach an adapter whose every number is moved from its start."""
    handle = attach(model, method, targets, seed=3, **options)
    shake(handle.parameters().values())
    return handle
