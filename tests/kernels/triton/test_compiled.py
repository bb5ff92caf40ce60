"""Every kernel compiles for GPUs that are not here, as the host code would launch it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 99 * 1024  # what a block may have on the smallest of these GPUs (compute capability 8.6 and 8.9)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    program = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run(
        [sys.executable, str(program), "--capability", str(capability)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(made) == 38  # ten kernels, three of them with two tiles and for both factors; bf16 and fp32
    assert [kernel for kernel in made if kernel["shared"] > SHARED_BYTES] == []
