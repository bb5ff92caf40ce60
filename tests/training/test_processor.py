"""What the processor gives: cores, a container's share of them, and the dtype that follows from its units."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit.training.config import TrainConfig
from lorakit.training.processor import Cores, bf16_unit, cores, in_words, limit_threads
from lorakit.training.recipe import Recipe, choose_dtype

GIB = 2**30


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Write a tree of control groups as Linux shows it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/pod/one\n", {"pod/one/cpu.max": "50000 100000\n", "pod/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/../other\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ("4:cpu,cpuacct:/docker/a\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2.0),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("9:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_the_share_is_the_smallest_limit_of_the_groups(
    tmp_path: Path, groups: str, files: dict[str, str], share: float | None
) -> None:
    assert cores(tree(tmp_path, groups, files)).share == share


def test_a_system_without_control_groups_has_no_share(tmp_path: Path) -> None:
    assert cores(tmp_path).share is None


@pytest.mark.parametrize(
    ("found", "usable"),
    [
        (Cores(64, 4.0), 4),
        (Cores(64, 3.5), 4),
        (Cores(64, 0.5), 1),
        (Cores(2, 8.0), 2),
        (Cores(2, None), 2),
    ],
)
def test_usable_threads_are_the_share_rounded_up(found: Cores, usable: int) -> None:
    assert found.usable == usable


@pytest.mark.parametrize(
    ("found", "before", "after"),
    [
        (Cores(64, 4.0), {}, {"OMP_NUM_THREADS": "4"}),
        (Cores(64, 4.0), {"OMP_NUM_THREADS": "16"}, {"OMP_NUM_THREADS": "16"}),
        (Cores(64, None), {}, {}),
        (Cores(4, 4.0), {}, {}),
    ],
)
def test_threads_are_limited_only_by_a_share_and_never_against_the_user(
    found: Cores, before: dict[str, str], after: dict[str, str]
) -> None:
    limit_threads(before, found)
    assert before == after


def test_torch_takes_the_limit() -> None:
    program = (
        "import os; from lorakit.training.processor import Cores, limit_threads;"
        "os.environ.pop('OMP_NUM_THREADS', None); limit_threads(os.environ, Cores(64, 1.0));"
        "import torch; print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_cores_are_counted_without_loading_torch() -> None:
    program = "import sys; from lorakit.training.processor import cores; cores(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("threads", "found", "words"),
    [
        (1, Cores(1, None), "1 thread"),
        (8, Cores(8, 8.0), "8 threads"),
        (4, Cores(64, 3.5), "4 threads: the container's share is 3.5 of 64 cores"),
        (
            64,
            Cores(64, 4.0),
            "64 threads: the container's share is 4 of 64 cores; torch.set_num_threads(4) uses no more",
        ),
    ],
)
def test_the_share_is_told(threads: int, found: Cores, words: str) -> None:
    assert in_words(threads, found) == words


@pytest.mark.parametrize(
    ("stored", "unit", "dtype"),
    [
        ("bf16", "AMX", "bf16"),
        ("bf16", None, "fp32"),
        ("fp32", "AMX", "fp32"),
        ("fp16", "AMX", "fp32"),
        (None, "AMX", "fp32"),
    ],
)
def test_only_a_base_stored_in_bf16_is_computed_in_bf16_and_only_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, stored: str | None, unit: str | None, dtype: str
) -> None:
    monkeypatch.setattr("lorakit.training.recipe.bf16_unit", lambda: unit)
    recipe = Recipe(device="cpu")
    choose_dtype(TrainConfig(), recipe, 1_000, 16 * GIB, stored)
    assert recipe.dtype == dtype


def test_the_dtype_asked_for_is_taken() -> None:
    recipe = Recipe(device="cpu")
    choose_dtype(TrainConfig(dtype="fp32"), recipe, 1_000, 16 * GIB, "bf16")
    assert (recipe.dtype, recipe.choices[-1].reason) == ("fp32", "as asked")


def test_a_base_too_large_for_fp32_is_loaded_in_bf16() -> None:
    recipe = Recipe(device="cpu")
    choose_dtype(TrainConfig(), recipe, 3 * GIB, 16 * GIB, "fp32")
    assert recipe.dtype == "bf16"


def test_the_unit_is_one_that_the_processor_says_it_has() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.is_file() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("needs Linux and oneDNN")
    text = flags.read_text()
    assert bf16_unit() == ("AMX" if "amx_bf16" in text else None)
