"""The GPU kernels against PEFT, torch.compile and the frozen base's limit, at the layer shapes of 1B to 8B models.

Needs an NVIDIA GPU of compute capability 8.0 and Triton; exits with 2 where there is none. For each layer shape and
dtype, every contender is first checked against float64 (output and all gradients, without dropout), then timed: forward
and backward of one adapted linear layer, W frozen in bf16, factors in fp32, gradients to x, A and B. Contenders take
turns; a ratio is taken within each turn, its median and range are printed. The limit is the same layer without adapter,
forward and input gradient: no adapter can be faster. The floor is the arithmetic of A and B alone, over the limit's.

Routed batches: eight adapters in one batch against one adapter on all rows; decoding with one row per adapter.

    python benchmarks/bench_gpu.py [--turns 20] [--tokens 4096] [--rank 16] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

# (d_out, d_in) of Llama 3.2 1B, Qwen 2.5 3B and Llama 3.1 8B: attention and MLP.
SHAPES = {
    "1B q": (2048, 2048),
    "1B gate": (8192, 2048),
    "1B down": (2048, 8192),
    "3B gate": (11008, 2048),
    "8B q": (4096, 4096),
    "8B k": (1024, 4096),
    "8B gate": (14336, 4096),
    "8B down": (4096, 14336),
}
ALPHA = 32
ADAPTERS = 8
# Norm of the difference to float64 over its norm: bf16 keeps 8 bits, and a gradient has gone through three roundings.
TOLERANCE = 2e-2


def milliseconds(call: Callable[[], object]) -> float:
    """Return the GPU's own time for a call, with the L2 cache emptied before it."""
    import torch

    torch.empty(64 * 2**20, dtype=torch.int32, device="cuda").zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def timed(contenders: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Let the contenders take turns, after three that warm up, and return the milliseconds of each turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 3):
        for name, call in contenders.items():
            taken = milliseconds(call)
            if turn >= 3:
                times[name].append(taken)
    return times


class Layer:
    """One frozen linear layer with one adapter, and everybody's way to compute it."""

    def __init__(self, d_out: int, d_in: int, tokens: int, rank: int, p: float) -> None:
        import torch

        def draw(*size: int, dtype: Any = torch.float32) -> Any:
            return (torch.randn(*size, device="cuda") / size[-1] ** 0.5).to(dtype)

        self.p, self.scale = p, ALPHA / rank
        self.x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16).requires_grad_()
        self.gy = torch.randn(tokens, d_out, device="cuda", dtype=torch.bfloat16)
        self.W = draw(d_out, d_in, dtype=torch.bfloat16)
        self.A, self.B = draw(rank, d_in).requires_grad_(), draw(d_out, rank).requires_grad_()
        self.compiled = torch.compile(self.plain)

    def plain(self, x: Any) -> Any:
        """Compute as torch does with plain operations."""
        from torch.nn import functional as F

        h = F.linear(F.dropout(x, self.p), self.A.to(x.dtype))
        return F.linear(x, self.W) + self.scale * F.linear(h, self.B.to(x.dtype))

    def ours(self, x: Any, fused: bool = False) -> Any:
        """Compute with the kernels of this library."""
        from lorakit.kernels.triton.linear import Adapted, adapted_linear

        (y,) = adapted_linear(x, [Adapted(self.W, None, self.A, self.B, self.scale)], self.p, fused=fused)
        return y

    def peft(self) -> Any:
        """Return PEFT's layer on the same tensors."""
        import torch
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        base = torch.nn.Linear(*reversed(self.W.shape), bias=False, device="meta")
        base.weight = torch.nn.Parameter(self.W, requires_grad=False)
        rank = self.A.shape[0]
        config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=self.p)
        layer = Linear(base, "a", config=config, r=rank, lora_alpha=ALPHA, lora_dropout=self.p).cuda()
        layer.lora_A["a"].weight.data.copy_(self.A.detach())
        layer.lora_B["a"].weight.data.copy_(self.B.detach())
        return layer

    def contenders(self) -> dict[str, Callable[[Any], Any]]:
        """Return every way from x to y, and the frozen base's."""
        from torch.nn import functional as F

        return {
            "limit": lambda x: F.linear(x, self.W),
            "plain": self.plain,
            "torch.compile": self.compiled,
            "PEFT": self.peft(),
            "ours": self.ours,
            "ours, one kernel": lambda x: self.ours(x, fused=True),
        }

    def leaves(self, compute: Any) -> list[Any]:
        """Return x and the factors that a contender trains."""
        import torch

        own = list(compute.parameters()) if isinstance(compute, torch.nn.Module) else [self.A, self.B]
        return [self.x, *(leaf for leaf in own if leaf.requires_grad)]

    def errors(self) -> dict[str, float]:
        """Return every contender's largest error against float64, over output and gradients."""
        import torch

        x, A, B = (t.detach().double().requires_grad_() for t in (self.x, self.A, self.B))
        y = x @ self.W.double().t() + self.scale * (x @ A.t()) @ B.t()
        wanted = [y, *torch.autograd.grad(y, (x, A, B), self.gy.double())]
        found = {}
        for name, compute in self.contenders().items():
            if name != "limit":
                y = compute(self.x)
                parts = [y, *torch.autograd.grad(y, self.leaves(compute), self.gy)]
                found[name] = max(
                    float((p - w).detach().norm() / w.detach().norm()) for p, w in zip(parts, wanted, strict=True)
                )
        return found

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return forward and backward of every contender."""
        import torch

        def step(name: str, compute: Any) -> Callable[[], object]:
            leaves = [self.x] if name == "limit" else self.leaves(compute)
            return lambda: torch.autograd.grad(compute(self.x), leaves, self.gy)

        return {name: step(name, compute) for name, compute in self.contenders().items()}


def routed(d_out: int, d_in: int, tokens: int, rank: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Return forwards of routed batches, and the error of the mixed one against float64."""
    import torch

    from lorakit.kernels.triton.routed import Pair, Route, routed_linear, routed_rows

    def draw(*size: int) -> Any:
        return torch.randn(*size, device="cuda") / size[-1] ** 0.5

    W = draw(d_out, d_in).bfloat16()
    x = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
    pairs = [[Pair(draw(rank, d_in), draw(d_out, rank), ALPHA / rank) for _ in range(ADAPTERS)]]
    mixed = torch.randint(0, ADAPTERS, (tokens,), device="cuda")
    mixed[:ADAPTERS] = few = torch.arange(ADAPTERS, device="cuda")
    tile = 64 if tokens >= 64 * ADAPTERS else 16
    routes = {
        "one adapter": Route.of(torch.zeros_like(mixed), ADAPTERS, tile),
        "mixed": Route.of(mixed, ADAPTERS, tile),
    }

    @torch.no_grad()
    def segments(name: str) -> Any:
        return routed_linear(x, [x @ W.t()], pairs, routes[name])[0]

    @torch.no_grad()
    def rows() -> Any:
        out = x[:ADAPTERS] @ W.t()
        routed_rows(x[:ADAPTERS], [out], pairs, few)
        return out

    wanted = x.double() @ W.double().t()
    for adapter, pair in enumerate(pairs[0]):
        on = (mixed == adapter)[:, None] * pair.scale
        wanted += on * (x.double() @ pair.A.double().t()) @ pair.B.double().t()
    found = [float((y - w).norm() / w.norm()) for y, w in ((segments("mixed"), wanted), (rows(), wanted[:ADAPTERS]))]
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: x @ W.t(),
        "one adapter": lambda: segments("one adapter"),
        "mixed": lambda: segments("mixed"),
        "base, 8 rows": lambda: x[:ADAPTERS] @ W.t(),
        "8 rows, 8 adapters": rows,
    }
    return calls, max(found)


def ratios(times: dict[str, list[float]], over: str) -> dict[str, tuple[float, float, float]]:
    """Return median, least and largest ratio to one contender, turn by turn."""
    found = {}
    for name, taken in times.items():
        each = [a / b for a, b in zip(taken, times[over], strict=True)]
        found[name] = (statistics.median(each), min(each), max(each))
    return found


def report(
    title: str, times: dict[str, list[float]], over: dict[str, str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Print a table of one case and return it as data."""
    say(title)
    rows = {}
    for name, taken in times.items():
        other = over.get(name, next(iter(times)))
        middle, low, high = ratios(times, other)[name]
        rows[name] = {"ms": statistics.median(taken), "ratio": middle, "least": low, "largest": high}
        say(f"  {name:20} {statistics.median(taken):8.3f} ms   {middle:5.2f} of {other} ({low:.2f} to {high:.2f})")
    return rows


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Check and time every case."""
    found: dict[str, Any] = {}
    for name, (d_out, d_in) in SHAPES.items():
        floor = 1 + 3 * options.rank * (d_out + d_in) / (2 * d_out * d_in)
        errors = Layer(d_out, d_in, 512, options.rank, 0.0).errors()
        refused(errors, name)
        for p in (0.0, 0.1):
            layer = Layer(d_out, d_in, options.tokens, options.rank, p)
            times = timed(layer.steps(), options.turns)
            size = f"{d_out} x {d_in}, {options.tokens} tokens, rank {options.rank}"
            title = f"{name}: {size}, dropout {p}, floor {floor:.3f}"
            found[title] = {"errors": errors, "floor": floor, "times": report(title, times, {}, say)}
        calls, error = routed(d_out, d_in, options.tokens, options.rank)
        refused({"routed": error}, name)
        title = f"{name}: {ADAPTERS} adapters in a batch of {options.tokens} rows, forward"
        over = {"mixed": "one adapter", "8 rows, 8 adapters": "base, 8 rows", "base, 8 rows": "base, 8 rows"}
        found[title] = {"errors": {"routed": error}, "times": report(title, timed(calls, options.turns), over, say)}
    return found


def refused(errors: dict[str, float], case: str) -> None:
    """End the program if somebody computes something else: its time would mean nothing."""
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        sys.exit(f"{case}: off from float64 by {wrong}, more than {TOLERANCE}: not timed.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    import torch

    from lorakit.kernels import triton

    if not torch.cuda.is_available() or not triton.available():
        why = triton.missing() or "Triton's interpreter is on (TRITON_INTERPRET): unset it"
        print(f"bench_gpu needs an NVIDIA GPU of compute capability 8.0 and Triton: {why}.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    say: Callable[[str], None] = (lambda line: print(line, file=sys.stderr)) if options.json else print
    gpu = torch.cuda.get_device_name()
    say(f"{gpu}, torch {torch.__version__}; ratios turn by turn: median (least to largest)")
    found = measure(options, say)
    if options.json:
        print(json.dumps({"gpu": gpu, "torch": torch.__version__, "cases": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
