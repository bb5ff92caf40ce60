"""How long a look inside an adapter of a model of seven billion parameters takes.

A PEFT folder with LLaMA-2-7B's seven kinds of layers in 32 blocks, at rank 16 with random factors, is made in a
temporary folder. Timed are the whole command in a new process, the library without the start of Python, what the
comparison with one base weight of 4096 x 4096 adds, and the dense way: the singular values of ``B A`` as a full
matrix, for one layer of 4096 x 4096 (the smallest here), times the number of layers, which is an extrapolation.

    python benchmarks/bench_spectrum.py [--runs 3] [--rank 16] [--blocks 32] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WIDTH, INNER = 4096, 11008
SHAPES = {
    **{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"},
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
COMMAND = "import sys; from lorakit.cli.main import main; sys.argv[0] = 'lorakit'; sys.exit(main())"


def write_adapter(folder: Path, blocks: int, rank: int) -> int:
    """Write the adapter and return its number of layers."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for block in range(blocks):
        for name, (d_out, d_in) in SHAPES.items():
            start = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{start}.lora_A.weight"] = torch.randn(rank, d_in)
            tensors[f"{start}.lora_B.weight"] = torch.randn(d_out, rank)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = sorted({name.rpartition(".")[2] for name in SHAPES})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return blocks * len(SHAPES)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, rank: int, runs: int) -> dict[str, list[float]]:
    """Return the seconds of every figure, by its name."""
    import torch

    from lorakit.adapters.spectrum import layer_spectra
    from lorakit.reports.spectrum_run import read_spectrum

    command = [sys.executable, "-c", COMMAND, "spectrum", str(folder), "--no-base"]
    A, B = torch.randn(rank, WIDTH), torch.randn(WIDTH, rank)
    W = torch.randn(WIDTH, WIDTH).bfloat16()
    figures: dict[str, Callable[[], object]] = {
        "command": lambda: subprocess.run(command, check=True, capture_output=True),
        "library": lambda: read_spectrum(folder, use_base=False),
        "one base weight": lambda: layer_spectra("layer", (A, B), W, overlap=True),
    }
    for name in ("library", "one base weight"):
        figures[name]()
    found = {name: [seconds(call) for _ in range(runs)] for name, call in figures.items()}
    found["one dense layer"] = [seconds(lambda: torch.linalg.svdvals(B @ A))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time lorakit spectrum on an adapter of a 7B model.")
    parser.add_argument("--runs", type=int, default=3, help="of each figure; the dense layer is timed once")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        num_layers = write_adapter(Path(place), options.blocks, options.rank)
        size = (Path(place) / "adapter_model.safetensors").stat().st_size
        found = measure(Path(place), options.rank, options.runs)
    medians = {name: statistics.median(values) for name, values in found.items()}
    dense = medians["one dense layer"] * num_layers
    summary = {
        "num_layers": num_layers,
        "rank": options.rank,
        "adapter_bytes": size,
        "median_s": medians,
        "dense_extrapolated_s": dense,
        "dense_over_library": dense / medians["library"],
        "dense_over_command": dense / medians["command"],
        "base_extrapolated_s": medians["one base weight"] * num_layers,
    }
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{num_layers} layers, rank {options.rank}, {size / 2**20:.0f} MiB; medians of {options.runs}")
    print(f"{'lorakit spectrum --no-base, whole command':<58}{medians['command']:>9.2f} s")
    print(f"{'the library: reading the file, all singular values':<58}{medians['library']:>9.2f} s")
    print(f"{'against one base weight of 4096 x 4096, more':<58}{medians['one base weight']:>9.2f} s")
    print(f"{'dense singular values of one layer of 4096 x 4096':<58}{medians['one dense layer']:>9.2f} s")
    print(f"{f'the same times {num_layers} layers (extrapolated)':<58}{dense:>9.0f} s")
    print(f"{'dense over the library':<58}{dense / medians['library']:>9.0f} x")
    print(f"{'dense over the whole command':<58}{dense / medians['command']:>9.0f} x")


if __name__ == "__main__":
    main()
