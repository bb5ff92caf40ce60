"""Run every claim in experiments/gates on its seeds, print what they gave, and write docs/gates.md.

What was measured is kept in experiments/results/gates.jsonl, so that an interrupted run goes on where it was; a gate
runs again when its file or the package's code has changed. Exit 1 where a claim fails.

    python experiments/run_gates.py [--only vera dora] [--fresh] [--jobs 2]
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.gate import Gate  # noqa: E402  # the path comes first
from experiments.gate_results import (  # noqa: E402
    Line,
    Row,
    append_line,
    beside_text,
    found_for,
    gates_page,
    read_lines,
    source_key,
    values_text,
    verdict,
)

GATES = ROOT / "experiments/gates"
RESULTS = ROOT / "experiments/results/gates.jsonl"
PAGE = ROOT / "docs/gates.md"


def gates_of(file: Path) -> list[Gate]:
    """Return the claims of one file."""
    gates: list[Gate] = importlib.import_module(f"experiments.gates.{file.stem}").GATES
    return gates


def measure(file: Path, key: str, results: Path) -> None:
    """Run what one file has not measured yet with the sources of this key."""
    lines = read_lines(results)
    for gate in gates_of(file):
        known = found_for(lines, key, gate)
        for seed in [seed for seed in range(gate.seeds) if seed not in known]:
            began = time.perf_counter()
            found = gate.measure(seed)
            seconds = time.perf_counter() - began
            append_line(results, Line(key, gate.claim, seed, float(found.value), dict(found.beside), round(seconds, 2)))
            print(f"{gate.method}: {gate.claim} seed {seed}: {found.value:.3g} in {seconds:.1f} s", file=sys.stderr)


def measure_all(keys: Mapping[Path, str], results: Path, jobs: int) -> list[str]:
    """Measure each file in a process of its own, ``jobs`` at a time; return the files whose process broke."""
    waiting, running, broken = list(keys), dict[str, subprocess.Popen[bytes]](), []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                file = waiting.pop(0)
                command = [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    "--measure",
                    file.stem,
                    keys[file],
                    "--results",
                    str(results),
                ]
                running[file.stem] = subprocess.Popen(command, env=environment)
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    broken += [name] if code else []
                    del running[name]
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
    return broken


def print_table(rows: Sequence[Row], broken: Sequence[str]) -> None:
    """Print a block per claim, as wide as the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    indent = " " * 10
    for gate, found in rows:
        parts = [
            f"{verdict(gate, found):>8}  {gate.method}: {gate.claim}",
            f"{indent}{gate.criterion}: {values_text(found) or '-'}",
            f"{indent}beside: {beside_text(found)}",
        ]
        for text in parts[: 3 if beside_text(found) else 2]:
            print(textwrap.fill(text, width, subsequent_indent=indent))
    verdicts = [verdict(gate, found) for gate, found in rows]
    words = ("pass", "FAIL", "reported", "not run")
    print("\n" + ", ".join(f"{verdicts.count(word)} {word}" for word in words if word in verdicts))
    for name in broken:
        print(f"experiments/gates/{name}.py broke: see above", file=sys.stderr)


def main() -> int:
    """Measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files or methods; the page is left as it is")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    parser.add_argument("--jobs", type=int, default=2, help="files at a time, a thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        name, key = given.measure
        measure(GATES / f"{name}.py", key, given.results)
        return 0
    files = sorted(path for path in GATES.glob("*.py") if path.name != "__init__.py")
    if given.only:
        wanted = {name.lower() for name in given.only}
        files = [f for f in files if f.stem in wanted or wanted & {gate.method.lower() for gate in gates_of(f)}]
        if not files:
            print(f"no gate is called {' or '.join(given.only)}", file=sys.stderr)
            return 2
    if given.fresh:
        _forget(files, given.results, all_of_them=not given.only)
    keys = {file: source_key(file) for file in files}
    broken = measure_all(keys, given.results, given.jobs)
    lines = read_lines(given.results)
    rows: list[Row] = []
    for file in files:
        if file.stem not in broken:
            rows += [(gate, found_for(lines, keys[file], gate)) for gate in gates_of(file)]
    print_table(rows, broken)
    if not given.only:
        PAGE.write_text(gates_page(rows), encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return 1 if broken or any(verdict(gate, found) in ("FAIL", "not run") for gate, found in rows) else 0


def _forget(files: Sequence[Path], results: Path, all_of_them: bool) -> None:
    """Take these files' lines out of the results."""
    claims = {gate.claim for file in files for gate in gates_of(file)}
    kept = [] if all_of_them else [line for line in read_lines(results) if line.gate not in claims]
    results.unlink(missing_ok=True)
    for line in kept:
        append_line(results, line)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
        sys.exit(130)
