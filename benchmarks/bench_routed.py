"""A batch whose rows have different adapters, against one adapter for all rows, in lorakit and in PEFT.

One LLaMA-like model of hidden size 512 for each library, with as many adapters (rank 8, all linear layers of the
blocks) as the batch can hold, in one process; what is compared takes turns, and ratios are of the least times (of one
CPU thread its own time, which other processes do not lengthen). A decoding step is one token per row; a prefill and a
training step (forward and backward, no optimizer) have 1,024 tokens. PEFT mixes adapters by ``adapter_names=``, in
evaluation mode only: its training step is that mode's with gradients. With ``--ways``: single layers, every way
measured against what the table predicts.

    OMP_NUM_THREADS=1 python benchmarks/bench_routed.py [--adapters 1 2 4 8] [--layers 4] [--turns 7] [--no-peft]
    OMP_NUM_THREADS=1 python benchmarks/bench_routed.py --ways
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

RANK, ALPHA, HIDDEN, VOCABULARY = 8, 16, 512, 1024
Run = Callable[[], Any]


def base(layers: int, dtype: torch.dtype) -> Any:
    """Return a frozen model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


class Ours:
    """lorakit with some adapters, B filled with noise."""

    name = "lorakit"

    def __init__(self, layers: int, count: int, dtype: torch.dtype) -> None:
        import lorakit as lk

        self.model = base(layers, dtype)
        for i in range(count):
            method = lk.LoRA(rank=RANK, alpha=ALPHA)
            self.handle = lk.attach(self.model, method, "all-linear", name=f"a{i}", seed=i, dtype=dtype)
        noise(self.model)

    def trainable(self, wanted: bool) -> None:
        """Make the adapters trainable, or not."""
        for name in self.handle.names:
            self.handle.trainable(name, wanted)

    def call(self, ids: torch.Tensor, names: list[str] | None) -> Any:
        """Run a batch; None is the first adapter for all rows."""
        if names is None:
            with self.handle.using("a0"):
                return self.model(input_ids=ids, use_cache=False).logits
        with self.handle.routed(names):
            return self.model(input_ids=ids, use_cache=False).logits

    def base(self, ids: torch.Tensor) -> Any:
        """Run the base alone."""
        with self.handle.disabled():
            return self.model(input_ids=ids, use_cache=False).logits


class Peft:
    """PEFT with some adapters, B filled with noise."""

    name = "peft"

    def __init__(self, layers: int, count: int, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = get_peft_model(base(layers, dtype), config, adapter_name="a0", autocast_adapter_dtype=False)
        for i in range(1, count):
            self.model.add_adapter(f"a{i}", config)
        self.model.eval()
        noise(self.model)

    def trainable(self, wanted: bool) -> None:
        """Make the adapters trainable, or not."""
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(wanted)

    def call(self, ids: torch.Tensor, names: list[str] | None) -> Any:
        """Run a batch; None is the first adapter for all rows."""
        given = {} if names is None else {"adapter_names": names}
        return self.model(input_ids=ids, use_cache=False, **given).logits


def noise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def step(library: Any, ids: torch.Tensor, names: list[str] | None, train: bool, clear: bool = True) -> Run:
    """Return one forward, or one forward and backward, after which gradients may be cleared."""

    def forward() -> Any:
        with torch.no_grad():
            return library.call(ids, names)

    def both() -> Any:
        library.call(ids, names).float().square().mean().backward()
        if clear:
            library.model.zero_grad(set_to_none=True)

    return both if train else forward


def turns(runs: dict[str, Run], count: int) -> dict[str, float]:
    """Return the least time of each, in milliseconds, taken in turns."""
    found = dict.fromkeys(runs, math.inf)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(count + 1):  # the first turn warms up, and counts as any other: the least time is asked for
        for name, run in runs.items():
            start = clock()
            run()
            found[name] = min(found[name], (clock() - start) * 1e3)
    return found


def case(label: str, libraries: list[Any], shape: tuple[int, int], count: int, train: bool, num: int) -> dict[str, Any]:
    """Measure one shape with ``count`` adapters in the batch."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    names = [f"a{i % count}" for i in range(shape[0])]
    runs: dict[str, Run] = {}
    for library in libraries:
        library.trainable(train)
        runs[f"{library.name} one"] = step(library, ids, None, train)
        runs[f"{library.name} mixed"] = step(library, ids, names, train)
    if not train:
        with torch.no_grad():
            runs["base"] = lambda: no_grad(libraries[0].base, ids)
    times = turns(runs, num)
    row = {"case": label, "rows": shape[0], "length": shape[1], "adapters": count}
    row |= {name: round(value, 2) for name, value in times.items()}
    for library in libraries:
        row[f"{library.name} ratio"] = round(times[f"{library.name} mixed"] / times[f"{library.name} one"], 3)
    if len(libraries) == 2:
        row["mixed, lorakit over peft"] = round(times["lorakit mixed"] / times["peft mixed"], 3)
    return row


def no_grad(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def single_layers() -> list[dict[str, Any]]:
    """Measure every way on single layers against what the table predicts."""
    from lorakit.kernels.cost_table import Problem, coefficients, predicted_us
    from lorakit.kernels.routed import Pairs
    from make_cost_table import Case, measure

    found = []
    for rows, groups, layout, trained in [
        (8, 8, "mixed", False),
        (8, 2, "partly", False),
        (64, 8, "mixed", False),
        (64, 64, "mixed", False),
        (256, 256, "mixed", False),
        (1024, 8, "sorted", False),
        (1024, 8, "mixed", False),
        (1024, 8, "sorted", True),
        (1024, 8, "uneven", True),
    ]:
        one = Case(rows, groups, RANK, (HIDDEN, HIDDEN), layout, False)
        factors = [torch.zeros(RANK, HIDDEN)] * groups, [torch.zeros(HIDDEN, RANK)] * groups
        problem = Problem.of(Pairs(*factors, [1.0] * groups, torch.float32), one.segments("cpu"))
        measured = measure(one, "cpu", torch.float32, trained, 0.05)
        costs = coefficients("cpu", "float32", trained)
        predicted = {way: predicted_us(costs[way], problem, way) for way in measured}
        chosen = min(predicted, key=lambda way: predicted[way])
        row: dict[str, Any] = {"rows": rows, "adapters": groups, "layout": layout, "trained": trained}
        row |= {way: f"{measured[way]:.0f} ({predicted[way]:.0f})" for way in measured}
        found.append({**row, "chosen": chosen, "regret": round(measured[chosen] / min(measured.values()), 3)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--ways", action="store_true", help="single layers only: every way, measured (predicted), in us"
    )
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = single_layers() if args.ways else models(args)
    for row in rows:
        print(json.dumps(row) if args.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def models(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every shape with every number of adapters."""
    dtype, most = getattr(torch, args.dtype), max(args.adapters)
    kinds = [Ours] if args.no_peft else [Ours, Peft]
    with contextlib.redirect_stdout(None):
        libraries = [kind(args.layers, most, dtype) for kind in kinds]
    found = []
    for count in args.adapters:
        decode = max(8, count)
        found.append(case("decode", libraries, (decode, 1), count, False, args.turns))
        if count <= 8:
            found.append(case("decode", libraries, (64, 1), count, False, args.turns))
            found.append(case("prefill", libraries, (8, 128), count, False, args.turns))
            found.append(case("train", libraries, (8, 128), count, True, args.turns))
    return found


if __name__ == "__main__":
    main()
