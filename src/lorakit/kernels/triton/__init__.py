"""Fast paths on NVIDIA GPUs, written in Triton; Triton itself is imported by the first kernel that runs.

Off unless ``LORAKIT_TRITON=1``: which of these kernels beat torch's own depends on the GPU, and
``benchmarks/bench_gpu.py`` tells.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.kernels.switch import fast
from lorakit.kernels.triton.launch import interpreted

__all__ = ["applies", "available", "chosen"]

SWITCH = "LORAKIT_TRITON"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_CAPABILITY = (8, 0)  # bf16 products in the tensor cores


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def missing() -> str:
    """Return what keeps the kernels from running here, in words; '' if nothing does."""
    if not _installed():
        return "Triton is not installed (pip install triton; Linux only)"
    if interpreted():
        return ""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "torch sees no NVIDIA GPU"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"the GPU's compute capability {torch.cuda.get_device_capability()} is below {LEAST_CAPABILITY}"
    return ""


def available() -> bool:
    """Tell whether the kernels can run here: Triton, and a GPU of compute capability 8.0 or Triton's interpreter."""
    return not missing()


def chosen() -> bool:
    """Tell whether the user asked for these kernels, with ``LORAKIT_TRITON=1`` and the fast paths on.

    Raises:
        ConfigError: the variable holds another word than '0' or '1', or the kernels cannot run here.
    """
    word = os.environ.get(SWITCH, "0")
    if word not in ("", "0", "1"):
        raise ConfigError(f"{SWITCH} is '1' (use the Triton kernels on the GPU) or '0', not {word!r}.")
    if word != "1" or not fast():
        return False
    if reason := missing():
        raise ConfigError(f"{SWITCH}=1 asks for the Triton kernels, but {reason}. Unset {SWITCH}.")
    return True


def applies(x: Tensor) -> bool:
    """Tell whether a layer with this input should be computed by these kernels.

    They are asked for, x is a real tensor on the current GPU, where Triton launches, of a dtype they know, and nothing
    else is about to rewrite the computation (``torch.compile`` makes kernels of the plain path itself; autocast would
    change dtypes).
    """
    return (
        x.is_cuda
        and x.device.index == torch.cuda.current_device()
        and not torch.compiler.is_compiling()
        and chosen()
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled("cuda")
    )
