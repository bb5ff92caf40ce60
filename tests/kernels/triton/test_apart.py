"""This folder's tests in a process of their own, for a process in which Triton is loaded without its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_pass_their_tests_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=folder.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
