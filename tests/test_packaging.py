"""The wheel: what is inside, and that it works in an environment where the checkout cannot be seen."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"
HEAVY = ("transformers", "datasets", "accelerate", "matplotlib")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this checkout on Python's path, and return its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without a network: the build backend is part of the test environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, and nothing else, into a new environment; return its Python.

    The dependencies, torch above all, are too large to install once more. A ``.pth`` file lets the new
    environment find them where the tests run. Python does not read the ``.pth`` files *there*, so a checkout
    installed in editable mode stays invisible, and what the environment itself holds comes first.
    """
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    interpreter = scripts / Path(sys.executable).name
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    own = run(interpreter, "-c", PRINT_PURELIB, cwd=folder).strip()
    borrowed = dict.fromkeys(sysconfig.get_path(place) for place in ("purelib", "platlib"))
    Path(own, "dependencies.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return interpreter


def version_of(wheel: Path) -> str:
    """Return the version in a wheel's file name, ``name-version-python-abi-platform.whl``."""
    return wheel.name.split("-")[1]


PRINT_PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    places = (p.relative_to(SOURCE) for p in (SOURCE / "lorakit").rglob("*") if p.is_file())
    wanted = {p.as_posix() for p in places if not any(part.startswith((".", "__pycache__")) for part in p.parts)}
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.parametrize("pattern", ["lorakit/py.typed", "lorakit/*.j2", "lorakit/*.jsonl"])
def test_the_wheel_holds_templates_demo_data_and_the_typing_marker(wheel: Path, pattern: str) -> None:
    assert fnmatch.filter(zipfile.ZipFile(wheel).namelist(), pattern) != []


def test_the_wheel_holds_nothing_but_the_package_and_its_metadata(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"lorakit", f"lorakit-{version_of(wheel)}.dist-info"}


def test_the_wheel_forces_no_build_of_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        requirements = message_from_string(archive.read(name).decode()).get_all("Requires-Dist", [])
    assert [r for r in requirements if r.startswith("torch") and ("==" in r or "+" in r or "@" in r)] == []


def test_the_installed_wheel_imports_and_says_its_version(wheel: Path, python: Path, tmp_path: Path) -> None:
    printed = run(python, "-c", "import lorakit; print(lorakit.__version__, lorakit.__file__)", cwd=tmp_path)
    version, file = printed.split(maxsplit=1)
    assert version == version_of(wheel)
    assert Path(file.strip()).is_relative_to(python.parents[1])


def test_the_installed_command_shows_its_help(python: Path, tmp_path: Path) -> None:
    assert "Usage" in run(python.with_name("lorakit"), "--help", cwd=tmp_path)


def test_every_module_of_the_installed_wheel_imports(python: Path, tmp_path: Path) -> None:
    run(python, "-c", IMPORT_EVERYTHING, cwd=tmp_path)


IMPORT_EVERYTHING = """
import importlib, pkgutil, lorakit
for module in pkgutil.walk_packages(lorakit.__path__, "lorakit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("package", HEAVY)
def test_importing_lorakit_loads_no_heavy_package(python: Path, tmp_path: Path, package: str) -> None:
    program = f"import lorakit, sys; print({package!r} in sys.modules)"
    assert run(python, "-c", program, cwd=tmp_path).strip() == "False"


@pytest.mark.parametrize("package", ["torch", *HEAVY])
def test_the_command_line_starts_without_heavy_packages(python: Path, tmp_path: Path, package: str) -> None:
    program = f"import lorakit.cli.main, sys; print({package!r} in sys.modules)"
    assert run(python, "-c", program, cwd=tmp_path).strip() == "False"
