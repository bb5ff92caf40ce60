"""How long it takes until lorakit is there: ``import lorakit`` beyond torch, and ``lorakit --help``.

Each figure is the median over several new processes; the first, with cold files, is not counted.

    python benchmarks/startup.py --runs 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

IMPORT_AFTER_TORCH = """
import time, torch
start = time.perf_counter()
import lorakit
print(time.perf_counter() - start)
"""
# What the installed script `lorakit` runs, with the Python of this benchmark.
HELP = "import sys; from lorakit.cli.main import main; sys.argv = ['lorakit', '--help']; sys.exit(main())"
EMPTY = "pass"

GOALS_S = {"import lorakit, beyond torch": 0.3, "lorakit --help": 0.5}


def printed_seconds(program: str) -> float:
    """Run a program in a new process and return the seconds it prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def wall_seconds(program: str) -> float:
    """Return the seconds from starting a new process until it has ended."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(runs: int) -> dict[str, list[float]]:
    """Measure each figure ``runs`` times, in turn, so that a slow moment of the machine meets them all."""
    figures = {
        "import lorakit, beyond torch": lambda: printed_seconds(IMPORT_AFTER_TORCH),
        "lorakit --help": lambda: wall_seconds(HELP),
        "python itself": lambda: wall_seconds(EMPTY),
    }
    for figure in figures.values():
        figure()
    measured: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(runs):
        for name, figure in figures.items():
            measured[name].append(figure())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the start of lorakit.")
    parser.add_argument("--runs", type=int, default=5, help="new processes per figure")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    options = parser.parse_args()
    measured = measure(options.runs)
    medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
    if options.json:
        print(json.dumps({"runs": options.runs, "median_s": medians, "goal_s": GOALS_S}, indent=2))
        return
    print(f"{'seconds, ' + str(options.runs) + ' runs':<30}{'median':>8}{'min':>8}{'max':>8}{'goal':>8}")
    for name, seconds in measured.items():
        goal = f"{GOALS_S[name]:.1f}" if name in GOALS_S else "-"
        print(f"{name:<30}{medians[name]:>8.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{goal:>8}")


if __name__ == "__main__":
    main()
