"""Loading many adapters onto one model: time of the n-th, memory of each, choosing and removing one among many.

A LLaMA of 32 layers with 224 adapted linear layers (hidden size 64) gets one saved adapter of rank 8 again and again,
under other names. PEFT loads the very same folder onto a copy of the model, in turns with lorakit, as far as
``--peft``: its time grows with the adapters that are there. What stands at an adapter's number is the median over its
neighbours; the whole time beside it also has what falls between them, such as Python's collections of garbage.

    python benchmarks/bench_loading.py [--adapters 1000] [--peft 20] [--json]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK = 8
SHOWN = (1, 5, 20, 100, 1000)
NEIGHBOURS = 3  # on each side


def build() -> Any:
    """Return a small LLaMA with as many layers as one of 7 to 8 billion numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def save_adapter(folder: Path) -> int:
    """Save an adapter whose B is not zero and return the bytes of its tensors."""
    import lorakit as lk

    handle = lk.attach(build(), lk.LoRA(rank=RANK), seed=0)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.normal_(std=0.02)
    lk.save(handle, folder)
    return sum(parameter.nbytes for parameter in handle.parameters().values())


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds that an action takes, and its result."""
    start = time.perf_counter()
    result = act()
    return 1e3 * (time.perf_counter() - start), result


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def forward_ms(model: Any, runs: int = 7) -> float:
    """Return the median time of a forward of eight tokens."""
    tokens = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        model(tokens)
        return statistics.median(timed(lambda: model(tokens))[0] for _ in range(runs))


class Lorakit:
    """The library measured."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, build()

    def load(self, number: int) -> None:
        """Load the adapter of this number, which then acts."""
        import lorakit as lk

        self.handle = lk.load(self.model, self.folder, f"a{number}")

    def forward(self) -> float:
        """Return the time of a forward with the last adapter."""
        return forward_ms(self.model)

    def route(self, name: str) -> None:
        """Send one row to an adapter and one to the base, and take that back."""
        with self.handle.routed([name, None]):
            pass

    def others(self, number: int) -> dict[str, float]:
        """Return the milliseconds of choosing, routing and removing among the adapters 1 to ``number``, medians."""
        found: dict[str, list[float]] = {"use": [], "route": [], "remove": []}
        for i in range(1, 8):
            name = f"a{1 + (i * 131) % number}"
            found["use"].append(timed(functools.partial(self.handle.use, name))[0])
            found["route"].append(timed(functools.partial(self.route, name))[0])
            found["remove"].append(timed(functools.partial(self.handle.remove, name))[0])
            self.load(int(name[1:]))
        return {name: statistics.median(values) for name, values in found.items()}


class Peft:
    """The library beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, build()
        self.adapted: Any = None

    def load(self, number: int) -> None:
        """Load the adapter of this number."""
        from peft import PeftModel

        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, self.folder, adapter_name=f"a{number}")
        else:
            self.adapted.load_adapter(self.folder, f"a{number}")

    def forward(self) -> float:
        """Return the time of a forward with the first adapter."""
        return forward_ms(self.adapted)


def at(times: list[float], number: int) -> float:
    """Return the median time of the adapters around a number, which counts from 1; of the first its own."""
    if number == 1:
        return times[0]
    return statistics.median(times[max(1, number - 1 - NEIGHBOURS) : number + NEIGHBOURS])


def measure(num_adapters: int, num_peft: int, folder: Path) -> dict[str, Any]:
    """Load adapter after adapter and return every figure."""
    tensor_bytes = save_adapter(folder)
    warm: list[Any] = [Lorakit(folder), *([Peft(folder)] if num_peft else [])]
    for library in warm:  # imports and caches that have nothing to do with a model
        library.load(1)
        library.forward()
    lorakit, peft = Lorakit(folder), Peft(folder)
    times: dict[str, list[float]] = {"lorakit": [], "peft": []}
    forwards: dict[str, dict[int, float]] = {"lorakit": {}, "peft": {}}
    others: dict[int, dict[str, float]] = {}
    resident = 0
    for number in range(1, num_adapters + 1):
        pair: list[tuple[str, Any]] = [("lorakit", lorakit), ("peft", peft)]
        for name, library in pair if number % 2 else reversed(pair):
            if name == "lorakit" or number <= num_peft:
                times[name].append(timed(functools.partial(library.load, number))[0])
                if number in SHOWN or number == num_adapters:
                    forwards[name][number] = library.forward()
        if number == max(num_peft, 1):
            resident = resident_bytes()
        if number in (1, num_adapters):
            others[number] = lorakit.others(number)
    grown = resident_bytes() - resident
    beyond = num_adapters - max(num_peft, 1)
    return {
        "num_adapters": num_adapters,
        "times_ms": times,
        "forwards_ms": forwards,
        "others_ms": others,
        "tensor_bytes": tensor_bytes,
        "bytes_per_adapter": grown / beyond if beyond else None,
    }


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    ours, theirs = found["times_ms"]["lorakit"], found["times_ms"]["peft"]
    print(f"{'adapters there':>15}{'load, ms':>10}{'PEFT':>9}{'ratio':>8}{'forward, ms':>13}{'PEFT':>9}")
    for number in sorted({n for n in (*SHOWN, found["num_adapters"]) if n <= found["num_adapters"]}):
        line = f"{number:>15,}{at(ours, number):>10.1f}"
        known = number <= len(theirs)
        line += (
            f"{at(theirs, number):>9.1f}{at(ours, number) / at(theirs, number):>8.2f}" if known else f"{'-':>9}{'-':>8}"
        )
        forwards = found["forwards_ms"]
        line += f"{forwards['lorakit'][number]:>13.1f}" + (
            f"{forwards['peft'][number]:>9.1f}" if known else f"{'-':>9}"
        )
        print(line)
    print()
    last = found["num_adapters"]
    early = statistics.median(ours[1 : 2 + 2 * NEIGHBOURS])
    print(f"growth of lorakit, adapter {last:,} over those after the first: {at(ours, last) / early:.2f}")
    if len(theirs) > 2 * NEIGHBOURS + 1:
        print(f"growth of PEFT, adapter {len(theirs):,} over the first: {at(theirs, len(theirs)) / theirs[0]:.2f}")
    print(f"all {last:,} together: {sum(ours) / 1e3:.1f} s; slowest {max(ours):.0f} ms")
    mib = found["tensor_bytes"] / 2**20
    if found["bytes_per_adapter"] is not None:
        print(f"memory of an adapter: {found['bytes_per_adapter'] / 2**20:.2f} MiB resident, its tensors {mib:.2f} MiB")
    for number, times in found["others_ms"].items():
        words = ", ".join(f"{name} {value:.3f} ms" for name, value in times.items())
        print(f"with {number:,} there: {words}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure loading many adapters.")
    parser.add_argument("--adapters", type=int, default=1000, help="adapters to load")
    parser.add_argument("--peft", type=int, default=20, help="of which PEFT loads so many; 0 leaves it out")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        found = measure(options.adapters, min(options.peft, options.adapters), Path(place) / "adapter")
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
