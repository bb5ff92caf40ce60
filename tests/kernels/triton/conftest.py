"""Kernels run where they can: on a GPU, else in Triton's interpreter, which must be chosen before Triton is imported.

Other tests of the same process may have imported it already (PEFT and ``torch.compile`` do). Then this folder's tests
are not collected here but run by ``test_apart.py``, in a process of their own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
APART = not (torch.cuda.is_available() or INTERPRETED) and "triton" in sys.modules
if not (torch.cuda.is_available() or APART):
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = ["test_[!a]*.py"] if APART else ["test_apart.py"]


@pytest.fixture
def device() -> torch.device:
    """Return the device on which kernels run here; skip where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is not installed (Linux only)")
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
