"""When the kernels are used: only when asked for, and Triton is imported only then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lorakit import kernels
from lorakit.errors import ConfigError
from lorakit.kernels import triton

# In a new process: this one has imported Triton. There, asking for it fails as if it were not installed.
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
import lorakit.kernels.triton.linear, lorakit.kernels.triton.routed
from lorakit.kernels import triton
print(triton.available(), triton.missing())
"""


def test_lorakit_works_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False Triton is not installed (pip install triton; Linux only)"


def test_the_kernels_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton.SWITCH, raising=False)
    assert not triton.chosen()


def test_the_switch_turns_them_on(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv(triton.SWITCH, "1")
    assert triton.chosen()


def test_the_plain_path_wins_over_the_switch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv(triton.SWITCH, "1")
    with kernels.use("plain"):
        assert not triton.chosen()


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton.SWITCH, "yes")
    with pytest.raises(ConfigError, match="not 'yes'"):
        triton.chosen()


def test_asking_where_they_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv(triton.SWITCH, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="asks for the Triton kernels, but"):
        triton.chosen()


def test_layers_on_the_cpu_stay_on_their_own_paths(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv(triton.SWITCH, "1")
    assert not triton.applies(torch.zeros(2, 3))
