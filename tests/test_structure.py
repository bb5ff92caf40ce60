"""The house rules, read from the source: who imports whom, how large a room is, what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "lorakit"

Rule = Callable[[Path], list[str]]

# The rooms of docs/architecture.md. A room imports from its own number or a lower one.
ROOMS = {
    "__main__": 8,
    "cli": 7,
    "reports": 6,
    "demos": 6,
    "training": 5,
    "serving": 5,
    "formats": 4,
    "compose": 4,
    "bases": 4,
    "text": 4,
    "adapters": 3,
    "methods": 2,
    "inits": 2,
    "layers": 1,
    "kernels": 1,
    "quant": 1,
    "errors": 0,
    "records": 0,
    "version": 0,
    "settings": 0,
    "files": 0,
    "typing": 0,
    "__version__": 0,
}
ROOT = 9  # `import lorakit` shows every room's public names, so nothing inside may ask it for one
APART = {frozenset({"training", "serving"})}

MAX_LINES = {"module": 400, "class": 200, "function": 60}

# Each costs seconds, or much memory: imported inside the functions that need it.
HEAVY = {"accelerate", "datasets", "jinja2", "matplotlib", "pandas", "pyarrow", "sklearn", "transformers", "triton"}
HEAVY_FOR_CLI = HEAVY | {"numpy", "torch"}  # `lorakit --help` does without torch

# Always there beside torch and transformers, which alone decide which versions of them fit.
COMES_ALONG = {"huggingface-hub", "numpy", "tokenizers", "typing-extensions"}


def sources(package: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Yield each module's place in the package, its room, and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        yield str(place), place.parts[0].removesuffix(".py"), ast.parse(path.read_text(encoding="utf-8"))


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run on import: no function bodies, nothing for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import_time(node)


def imported(nodes: Iterator[ast.AST], place: str = "") -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, relative ones and ``import_module("...")`` resolved."""
    package = ("lorakit", *Path(place).parts[:-1])
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def room_imports(package: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (place and line, importing room, imported room or '' for the root) inside the package."""
    for place, room, tree in sources(package):
        for line, name in imported(ast.walk(tree), place):
            top, _, rest = name.partition(".")
            if top == "lorakit":
                target = rest.partition(".")[0]
                is_room = target in ROOMS or (package / target).is_dir() or (package / f"{target}.py").is_file()
                yield f"{place}:{line}", room, target if target and is_room else ""


def upward_imports(package: Path) -> list[str]:
    """Find imports of a higher room, between rooms that stay apart, and rooms that have no number."""
    found = []
    for where, room, target in room_imports(package):
        if room == "__init__" or room == target:
            continue
        if unknown := {room, target} - set(ROOMS) - {""}:
            found.append(f"{where}: no room number for {sorted(unknown)}; give it one in ROOMS")
        elif (ROOMS[target] if target else ROOT) > ROOMS[room]:
            found.append(f"{where}: '{room}' imports '{target or 'lorakit'}', which is above it")
        elif frozenset({room, target}) in APART:
            found.append(f"{where}: '{room}' and '{target}' never import each other")
    return found


def unnumbered_rooms(package: Path) -> list[str]:
    """Find rooms without a number, also those that import nothing."""
    return sorted({room for _, room, _ in sources(package)} - set(ROOMS) - {"__init__"})


def mutual_imports(package: Path) -> list[str]:
    """Find pairs of rooms that import each other."""
    pairs = {(room, target) for _, room, target in room_imports(package) if target and room != target}
    return sorted(f"{a} <-> {b}" for a, b in pairs if a < b and (b, a) in pairs and a != "__init__")


def oversized(package: Path) -> list[str]:
    """Find modules, classes and functions above their ceiling, docstrings and comments included."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place, text = path.relative_to(package), path.read_text(encoding="utf-8")
        spans = [("module", str(place), text.count("\n"))]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                spans.append((kind, f"{place}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1))
        found += [f"{name}: {n} lines, {MAX_LINES[kind]} at most" for kind, name, n in spans if n > MAX_LINES[kind]]
    return found


def heavy_imports(package: Path) -> list[str]:
    """Find heavy packages that are loaded by merely importing a module."""
    found = []
    for place, room, tree in sources(package):
        heavy = HEAVY_FOR_CLI if room in {"cli", "__main__", "__init__"} else HEAVY
        for line, name in imported(at_import_time(tree), place):
            if name.partition(".")[0] in heavy:
                found.append(f"{place}:{line}: {name} at import time")
    return found


def broad_excepts(package: Path) -> list[str]:
    """Find handlers of everything; ``except BaseException`` may raise again, or hand the error on."""
    found = []
    for place, _, tree in sources(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                inside = [inner for statement in node.body for inner in ast.walk(statement)]
                kept = any(isinstance(inner, ast.Name) and inner.id == node.name for inner in inside)
                if not caught or re.search(r"\bException\b", caught):
                    found.append(f"{place}:{node.lineno}: except {caught}")
                elif "BaseException" in caught and not (kept or isinstance(node.body[-1], ast.Raise)):
                    found.append(f"{place}:{node.lineno}: except {caught} loses the error")
    return found


def distributions(package: Path) -> set[str]:
    """Return the installed distributions that the package's modules import anywhere."""
    known = metadata.packages_distributions()
    names = {name.partition(".")[0] for _, _, tree in sources(package) for _, name in imported(ast.walk(tree))}
    names -= {"lorakit", "", *sys.stdlib_module_names}
    return {normalized(known.get(name, [name])[0]) for name in names}


def normalized(requirement: str) -> str:
    """Reduce a requirement to its project's name, as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def foreign_paths(files: list[Path]) -> list[str]:
    """Find absolute paths of one person's machine in text or binary files."""
    homes = "|".join(["work/", r"home/\w", r"Users/\w", "root/"])
    pattern = re.compile(rf"(?<![\w.])/({homes})".encode())
    found = []
    for file in files:
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
            if match := pattern.search(line):
                found.append(f"{file.name}:{number}: {match.group().decode()}")
    return found


def repository_files() -> list[Path]:
    """Return the files that git keeps, or would keep."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the repository cannot be told")
    files = [REPOSITORY / name for name in listing.stdout.decode().split("\0") if name]
    return [file for file in files if file.is_file()]


def test_no_room_imports_upwards() -> None:
    assert upward_imports(PACKAGE) == []


def test_every_room_has_a_number() -> None:
    assert unnumbered_rooms(PACKAGE) == []


def test_no_two_rooms_import_each_other() -> None:
    assert mutual_imports(PACKAGE) == []


def test_no_module_class_or_function_is_above_its_ceiling() -> None:
    assert oversized(PACKAGE) == []


def test_heavy_packages_load_on_first_use() -> None:
    assert heavy_imports(PACKAGE) == []


def test_no_handler_catches_everything() -> None:
    assert broad_excepts(PACKAGE) == []


@pytest.mark.parametrize(("folder", "extras"), [("src/lorakit", {"demo"}), ("tests", ...), ("benchmarks", ...)])
def test_every_imported_package_is_a_declared_dependency(folder: str, extras: set[str]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *COMES_ALONG]
    for extra, requirements in project["optional-dependencies"].items():
        declared += requirements if extras is ... or extra in extras else []
    own = {name for path in (REPOSITORY / folder).rglob("*.py") for name in (path.stem, path.parent.name)}
    found = distributions(REPOSITORY / folder) - {normalized(name) for name in [*declared, *own]}
    assert sorted(found) == []


def test_no_file_names_a_place_of_one_machine() -> None:
    assert foreign_paths(repository_files()) == []


BROKEN = {
    "upwards": (upward_imports, "above it", "layers/a.py", "from lorakit.methods import LoRA"),
    "upwards in a function": (
        upward_imports,
        "above it",
        "text/a.py",
        "def f():\n    import lorakit.cli.main",
    ),
    "upwards for types": (
        upward_imports,
        "above it",
        "text/a.py",
        "if TYPE_CHECKING:\n    import lorakit.cli",
    ),
    "upwards, relative": (upward_imports, "above it", "layers/a.py", "from ..methods.lora import LoRA"),
    "upwards, by name": (upward_imports, "above it", "text/a.py", "importlib.import_module('lorakit.cli')"),
    "the root": (upward_imports, "'lorakit', which is above", "layers/a.py", "from lorakit import LoRA"),
    "rooms apart": (upward_imports, "never import", "serving/a.py", "from lorakit import training"),
    "unknown importer": (upward_imports, "number for ['attic']", "attic/a.py", "import lorakit.errors"),
    "unknown room": (unnumbered_rooms, "attic", "attic/a.py", "x = 1"),
    "each other": (mutual_imports, "kernels <-> layers", "kernels/a.py", "import lorakit.layers"),
    "long module": (oversized, "401 lines", "files.py", "x = 1\n" * 401),
    "long class": (oversized, "A: 201 lines", "files.py", "class A:" + "\n    x = 1" * 200),
    "long method": (oversized, "f: 61 lines", "files.py", "class A:\n  def f():" + "\n    x = 1" * 60),
    "heavy": (
        heavy_imports,
        "transformers",
        "bases/a.py",
        "try:\n    import transformers.models\nfinally: f()",
    ),
    "torch in cli": (heavy_imports, "torch.nn", "cli/a.py", "from torch import nn"),
    "torch in the root": (heavy_imports, "torch", "__init__.py", "import torch"),
    "Exception": (
        broad_excepts,
        "files.py:3",
        "files.py",
        "try:\n    f()\nexcept (OSError, Exception): raise",
    ),
    "bare except": (broad_excepts, "files.py:3", "files.py", "try:\n    f()\nexcept: raise"),
    "swallowed": (broad_excepts, "loses", "files.py", "try:\n    f()\nexcept BaseException: pass"),
}


@pytest.mark.parametrize(("rule", "message", "place", "source"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_found(tmp_path: Path, rule: Rule, message: str, place: str, source: str) -> None:
    module = sound_package(tmp_path) / place
    module.parent.mkdir(exist_ok=True)
    module.write_text(source, encoding="utf-8")
    found = rule(tmp_path)
    assert any(message in line for line in found), found


@pytest.mark.parametrize("rule", sorted({case[0] for case in BROKEN.values()}, key=lambda rule: rule.__name__))
def test_a_sound_package_breaks_no_rule(tmp_path: Path, rule: Rule) -> None:
    assert rule(sound_package(tmp_path)) == []


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    import yaml, no_such_package.inner, os.path\n", encoding="utf-8")
    assert distributions(tmp_path) == {"pyyaml", "no-such-package"}


@pytest.mark.parametrize("text", ["{}work/x", "'{}home/me'", "({}Users/me)", "={}root/.cache"])
def test_a_place_of_one_machine_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.md").write_text(f"first line\nsee {text.format('/')} there\n", encoding="utf-8")
    assert len(foreign_paths([tmp_path / "page.md"])) == 1


@pytest.mark.parametrize("text", ["frame/work/x", "https://example.org/home/page", "~/work"])
def test_a_path_inside_another_is_no_place_of_a_machine(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert foreign_paths([tmp_path / "page.md"]) == []


def sound_package(folder: Path) -> Path:
    """Write a small package that keeps every rule, using what each rule allows."""
    modules = {
        "__init__.py": "def __getattr__(name):\n    import torch\n    from lorakit.cli import main\n",
        "errors.py": "import difflib\n",
        "files.py": "import lorakit.errors\ntry:\n    f()\nexcept BaseException:\n    g()\n    raise\n",
        "layers/linear.py": "import torch\nfrom lorakit.kernels import fast\nfrom ..errors import A\n",
        "kernels/fast.py": "try:\n    f()\nexcept BaseException as error:\n    errors.append(error)\n",
        "methods/lora.py": "from lorakit import __version__, inits, layers\nfrom .base import Method\n",
        "bases/load.py": "def load():\n    import transformers\n",
        "training/loop.py": "from lorakit.methods.lora import LoRA\nfrom lorakit.bases import load\n",
        "cli/train.py": "if TYPE_CHECKING:\n    import torch\nfrom lorakit.training import x\n",
    }
    for place, source in modules.items():
        module = folder / place
        module.parent.mkdir(exist_ok=True)
        module.write_text(source, encoding="utf-8")
    return folder
