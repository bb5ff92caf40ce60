"""Compile every kernel for a GPU that need not be there, as the host code would launch it; print what each takes.

    python tests/kernels/triton/compile_for_gpu.py [--capability 80]

The host functions run on the CPU with recorders in place of the kernels; what they would launch is compiled with the
same types, divisibilities and constants. Prints one JSON object per kernel: name, shared memory in bytes, and, where
Triton brings the tool, registers per thread and bytes that did not fit in them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorakit.kernels.triton import launch, linear, routed

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
WIDTH, RANK, ROWS = 256, 16, 512


class Recorder:
    """Stands in a kernel's place and writes down its launches."""

    def __init__(self, kernel: Any, launches: dict[str, tuple[Any, dict[str, Any]]], label: str) -> None:
        self.kernel, self.launches, self.label = kernel, launches, label

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*args: Any, **kwargs: Any) -> None:
            names = [name for name in self.kernel.arg_names if name not in kwargs]
            known = dict(zip(names, args, strict=True)) | kwargs
            cut = "".join(f", {name} {known[name]}" for name in ("BM", "RANK_FIRST") if name in known)
            self.launches.setdefault(f"{self.label} {self.kernel.__name__}{cut}", (self.kernel, known))

        return record


def source(kernel: Any, known: dict[str, Any]) -> ASTSource:
    """Return the kernel with the types, constants and divisibilities of one launch."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = known[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = (
            f"*{TYPES[value.dtype]}" if tensor else "fp32" if isinstance(value, float) else "i32"
        )
        if tensor or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def launches(dtype: torch.dtype, label: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Run the host functions on the CPU and return what they would launch."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in ("device_linear", "device_routed"):
        module = launch.compiled(name)
        for key, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction):
                vars(module)[key] = Recorder(kernel, found, label)
    tiles = launch.Tiles(**vars(launch.tiles_for(torch.empty(0, dtype=dtype))) | {"programs": 264})
    x = torch.zeros(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    W = torch.zeros(2 * WIDTH, WIDTH, dtype=dtype)
    A, B = torch.zeros(RANK, WIDTH, requires_grad=True), torch.zeros(2 * WIDTH, RANK, requires_grad=True)
    for fused in (False, True):
        (y,) = linear.adapted_linear(x, [linear.Adapted(W, W[:, 0].contiguous(), A, B)], 0.1, None, fused, tiles)
        y.sum().backward()
    pairs = [[routed.Pair(A, B, 1.0)] * 8] * 3
    outs = [torch.zeros(ROWS, 2 * WIDTH, dtype=dtype) for _ in pairs]
    ids = torch.zeros(ROWS, dtype=torch.int32)
    routed.routed_rows(x, outs, pairs, ids, tiles)
    for rows in (16, 64):  # of a tile, as ``ways`` cuts them
        outs = [out.detach() for out in outs]
        sum(out.sum() for out in routed.routed_linear(x, outs, pairs, routed.Route.of(ids, 8, rows), tiles)).backward()
    for name in ("device_linear", "device_routed"):
        for key, kernel in list(vars(launch.compiled(name)).items()):
            if isinstance(kernel, Recorder):
                vars(launch.compiled(name))[key] = kernel.kernel
    return found


def registers(cubin: bytes) -> dict[str, int]:
    """Return registers per thread and bytes of stack (what did not fit in them), if Triton brings the tool."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args().capability
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for name, (kernel, known) in launches(dtype, label).items():
            options = {option: known[option] for option in OPTIONS}
            made = triton.compile(source(kernel, known), target=GPUTarget("cuda", capability, 32), options=options)
            told = {"kernel": name, "shared": made.metadata.shared, **registers(made.asm["cubin"])}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
