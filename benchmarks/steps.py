"""Training steps of several libraries on the same model and batch, taken in turns in one process.

Each way to train is built once; then rounds begin in which each takes one step, so that what a machine does meanwhile
meets all of them alike, and ratios are taken within a round. Of one CPU thread its own time is taken, which other
processes lengthen least, else the clock's. The order changes with every round.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

RANK = 8
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = {
    "limit": "the frozen base: forward, and backward to its inputs; no adapter can beat it",
    "limit, quick": "the same with lorakit's gradient of attention, which helps a frozen base too",
    "limit, compiled": "the same with that and with its blocks compiled",
    "lorakit": "lorakit",
    "compiled": "lorakit with its blocks compiled (--compile)",
    "recompute": "lorakit, with what is cheap made again in the backward pass",
    "plain": "lorakit with its fast paths off",
    "PEFT": "PEFT's defaults",
    "PEFT, best": "PEFT with adapters in the base's dtype",
    "parametrize": "torch's own parametrisation, W + s B A",
    "full": "full fine-tuning",
}
QUICK = ("limit, quick", "limit, compiled", "lorakit", "compiled", "recompute")
COMPILED = ("limit, compiled", "compiled")
WARM_UP = 3
NOISY = 0.05
"""A row is noisy from this spread of the limit's steps on: half the range of their middle half, over the median."""


@dataclass(frozen=True)
class Case:
    """A model, a batch and an adapter; ``targets`` None stands for all linear layers of the body."""

    model: str = "llama"
    rows: int = 4
    length: int = 256
    dtype: str = "fp32"
    dropout: float = 0.0
    dora: bool = False
    rank: int = RANK
    targets: tuple[str, ...] | None = None
    width: int = 512
    layers: int = 8


@dataclass(frozen=True)
class Measured:
    """What one way took: seconds of its rounds, bytes at a step's peak, bytes kept, the last loss, its operations.

    Bytes and operations are 0 for what is compiled, which cannot be looked into.
    """

    seconds: tuple[float, ...]
    peak_bytes: int
    saved_bytes: int
    loss: float
    flops: int


def build(case: Case) -> Any:
    """Return a frozen model with random weights of a real shape."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    if case.model == "bert":
        config: Any = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=6
        )
        model: Any = BertForSequenceClassification(config)
    elif case.model == "mixtral":
        config = MixtralConfig(
            hidden_size=384,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_local_experts=8,
            vocab_size=4096,
            max_position_embeddings=512,
            use_cache=False,
        )
        model = MixtralForCausalLM(config)
    else:
        config = LlamaConfig(
            hidden_size=case.width,
            intermediate_size=case.width * 43 // 16,
            num_hidden_layers=case.layers,
            num_attention_heads=max(1, case.width // 64),
            num_key_value_heads=max(1, case.width // 64),
            vocab_size=8192,
            max_position_embeddings=max(512, case.length),
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    return model.to({"bf16": torch.bfloat16}.get(case.dtype, torch.float32)).requires_grad_(False).train()


def adapted(way: str, case: Case) -> tuple[Any, list[nn.Parameter]]:
    """Return a model made ready for a way, and what is trained."""
    model = build(case)
    head = ["classifier"] if case.model == "bert" else []
    if way in ("lorakit", "compiled", "recompute", "plain"):
        import lorakit as lk

        method = (lk.DoRA if case.dora else lk.LoRA)(rank=case.rank, alpha=2 * case.rank, dropout=case.dropout)
        targets: Any = "all-linear" if case.targets is None else list(case.targets)
        return model, list(lk.attach(model, method, targets, train_modules=head, seed=0).parameters().values())
    if way.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            lora_dropout=case.dropout,
            use_dora=case.dora,
            target_modules="all-linear" if case.targets is None else list(case.targets),
            target_parameters=EXPERTS if case.model == "mixtral" else None,
            modules_to_save=head or None,
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
        )
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=way == "PEFT")
        return wrapped, [p for p in wrapped.parameters() if p.requires_grad]
    if way == "full":
        model.requires_grad_(True)
    elif way == "parametrize":
        _parametrize(model, case)
    return model, [p for p in model.parameters() if p.requires_grad]


class _Update(nn.Module):
    def __init__(self, W: Tensor, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, W.shape[1], dtype=W.dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(W.shape[0], rank, dtype=W.dtype))

    def forward(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.B, self.A, alpha=2.0)


def _parametrize(model: nn.Module, case: Case) -> None:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    for module in linear:
        nn.utils.parametrize.register_parametrization(module, "weight", _Update(module.weight, case.rank))


@contextlib.contextmanager
def _paths(way: str) -> Iterator[None]:
    from lorakit import kernels
    from lorakit.kernels.attention import quick_attention
    from lorakit.kernels.recompute import recomputing

    keeping = recomputing() if way == "recompute" else contextlib.nullcontext()
    attention = quick_attention() if way in QUICK else contextlib.nullcontext()
    with kernels.use("plain" if way == "plain" else "fast"), keeping, attention:
        yield


class Trainer:
    """One way to train: its model, and steps on one batch."""

    def __init__(self, way: str, case: Case) -> None:
        from lorakit.training.compiling import CompiledBlocks

        self.way, self.case = way, case
        self.model, self.parameters = adapted(way, case)
        generator = torch.Generator().manual_seed(1)
        size = (case.rows, case.length)
        self.ids = torch.randint(5, self.model.config.vocab_size, size, generator=generator)
        self.labels = torch.randint(6, (case.rows,), generator=generator)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True) if self.parameters else None
        self.blocks = CompiledBlocks(self.model) if way in COMPILED else None

    def loss(self) -> Tensor:
        """Return the batch's loss; all ways have the same code for it."""
        from torch.nn import functional as F

        with contextlib.nullcontext() if self.blocks is None else self.blocks.running():
            if self.optimizer is None:
                embedded = self.model.get_input_embeddings()(self.ids).detach().requires_grad_()
                logits = self.model(inputs_embeds=embedded).logits
            else:
                logits = self.model(input_ids=self.ids).logits
        if self.case.model == "bert":
            return F.cross_entropy(logits.float(), self.labels)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())

    def step(self) -> float:
        """Take a step and return its loss."""
        with _paths(self.way):
            loss = self.loss()
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def saved_bytes(self, *, body: bool = False) -> int:
        """Return the bytes kept for the backward pass, each storage once, without the model's own.

        With ``body`` those of a LLaMA's blocks alone, without logits and loss.
        """
        from transformers import LlamaModel

        own = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        inner = next((module for module in self.model.modules() if isinstance(module, LlamaModel)), None)
        kept: list[Tensor] = []
        with _noting(self.way, kept):
            if body:
                assert inner is not None
                embedded = inner.embed_tokens(self.ids)
                out = inner(inputs_embeds=embedded if self.parameters else embedded.detach().requires_grad_())[0]
            else:
                out = self.loss()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        del out
        kept.clear()  # the graph knows who looked at it, and what was seen holds the graph
        return sum(size for place, size in storages.items() if place not in own)

    def flops(self) -> int:
        """Return the additions and multiplications of a step's matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        def count(out: Any, a: Any, b: Any, *beside: Any, out_shape: Any = None, **more: Any) -> int:
            return 2 * a[0] * a[1] * b[1]

        in_place = {torch.ops.aten.addmm_: count}  # torch's counter does not know it
        with _paths(self.way), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


@contextlib.contextmanager
def _noting(way: str, kept: list[Tensor]) -> Iterator[None]:
    """Write down every tensor that is kept."""
    from lorakit.kernels import recompute

    if way != "recompute":

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor.detach()

        with _paths(way), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        return
    original = recompute._pack

    def pack(tensor: Tensor) -> Any:
        packed = original(tensor)
        kept.extend([packed.tensor] if isinstance(packed, recompute._Kept) else [])
        return packed

    recompute._pack = pack
    try:
        with _paths(way):
            yield
    finally:
        recompute._pack = original


def in_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = WARM_UP
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Let each run once in every round, in changing order; return the seconds that count, and what each last gave."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    last: dict[str, Any] = {}
    for turn in range(warm_up + rounds):
        for way in runs if turn % 2 == 0 else reversed(runs):
            begun = clock()
            last[way] = runs[way]()
            if turn >= warm_up:
                seconds[way].append(clock() - begun)
    return seconds, last


def compare(case: Case, ways: Sequence[str], rounds: int, *, memory: bool = True) -> dict[str, Measured]:
    """Let the ways take turns.

    Args:
        case: what is trained.
        ways: names of ``WAYS``; 'limit' is to be among them.
        rounds: steps of each that count.
        memory: measure peak and kept bytes, and operations, too.
    """
    from lorakit.training.memory import peak_bytes

    trainers = {way: Trainer(way, case) for way in ways}
    cpu = torch.device("cpu")
    seen = {way: t for way, t in trainers.items() if way not in COMPILED}  # what is compiled cannot be looked into
    # The first step gives the optimizer its state, the second shows which layers read the same input.
    peaks = {way: max(peak_bytes(t.step, cpu) for _ in range(2)) if memory else 0 for way, t in seen.items()}
    saved = {way: t.saved_bytes() if memory else 0 for way, t in seen.items()}
    flops = {way: t.flops() for way, t in seen.items()}
    for way in trainers.keys() - seen.keys():  # as many steps as the others have taken: losses are to be alike
        for _ in range(2 if memory else 0):
            trainers[way].step()
    seconds, losses = in_turns({way: trainer.step for way, trainer in trainers.items()}, rounds)
    memories = {way: (peaks.get(way, 0), saved.get(way, 0)) for way in ways}
    return {way: Measured(tuple(seconds[way]), *memories[way], losses[way], flops.get(way, 0)) for way in ways}


def ratio(one: Measured, other: Measured) -> tuple[float, float, float]:
    """Return the median ratio of two ways' steps in the same round, and its quartiles."""
    ratios = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, first, third


def spread(one: Measured) -> float:
    """Return half the range of the middle half of a way's steps, over their median."""
    if len(one.seconds) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(one.seconds, n=4, method="inclusive")
    return (third - first) / 2 / middle
