"""What the gates gave: a line of JSON per gate and seed, verdicts, and the tables made of them.

A line counts only for the sources that it was measured with: the gate's file, what the experiments share, and the
package's layers, methods, inits and adapters. So a changed gate runs again, and all do once the code has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from experiments.gate import Found, Gate

ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("layers", "methods", "inits", "adapters")


@dataclass(frozen=True)
class Line:
    """One gate on one seed.

    Attributes:
        key: the hash of all sources that it depends on.
        gate: the gate's claim.
        seed, value, beside: see :class:`Found`.
        seconds: how long it took.
    """

    key: str
    gate: str
    seed: int
    value: float
    beside: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def source_key(file: Path, root: Path = ROOT) -> str:
    """Return a hash of a gate's file and of the code that it measures."""
    shared = sorted(path for path in (root / "experiments").glob("*.py") if not path.name.startswith("run_"))
    code = sorted(path for room in _ROOMS for path in (root / "src/lorakit" / room).rglob("*.py"))
    digest = hashlib.sha256()
    for path in (file, *shared, *code):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_lines(file: Path) -> list[Line]:
    """Return what was measured so far; a last line that was cut off is left out."""
    found = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(Line(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return found


def append_line(file: Path, line: Line) -> None:
    """Add a line; what is there stays whole if this is interrupted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(line)) + "\n")


def found_for(lines: Iterable[Line], key: str, gate: Gate) -> dict[int, Found]:
    """Return what a gate gave with these sources, by seed; the last line counts."""
    mine = [line for line in lines if line.key == key and line.gate == gate.claim and line.seed < gate.seeds]
    return {line.seed: Found(line.value, line.beside) for line in mine}


def verdict(gate: Gate, found: Mapping[int, Found]) -> str:
    """Return 'pass', 'FAIL', 'reported', or 'not run' where seeds are missing."""
    if len(found) < gate.seeds:
        return "not run"
    if gate.passes is None:
        return "reported"
    met = sum(gate.passes(one.value) for one in found.values())
    return "pass" if met >= gate.needed else "FAIL"


def values_text(found: Mapping[int, Found]) -> str:
    """Write the values of all seeds in the seeds' order."""
    return ", ".join(number(found[seed].value) for seed in sorted(found))


def beside_text(found: Mapping[int, Found]) -> str:
    """Write the other figures, each as one number or as the range over the seeds."""
    names = list(dict.fromkeys(name for one in found.values() for name in one.beside))
    parts = []
    for name in names:
        values = [one.beside[name] for one in found.values() if name in one.beside]
        low, high = number(min(values)), number(max(values))
        parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return "; ".join(parts)


def number(value: float) -> str:
    """Write a figure with three digits; whole numbers whole.

    >>> number(0.0), number(1234.0), number(0.98765), number(4.2e-14)
    ('0', '1,234', '0.988', '4.2e-14')
    """
    return f"{int(value):,}" if value == value and abs(value) < 1e9 and value == int(value) else f"{value:.3g}"


Row = tuple[Gate, Mapping[int, Found]]


def gates_page(rows: Sequence[Row]) -> str:
    """Return docs/gates.md."""
    verdicts = [verdict(gate, found) for gate, found in rows]
    counts = {word: verdicts.count(word) for word in ("pass", "FAIL", "reported", "not run")}
    said = {"pass": "pass", "FAIL": "fail", "reported": "are reported without a promise", "not run": "have not run"}
    summary = ", ".join(f"{count} {said[word]}" for word, count in counts.items() if count)
    lines = [
        "# Gates",
        "",
        "Each method and each initialisation makes claims that a small experiment can refute. `make gates` runs every",
        "one of them on several seeds and writes this page; [methods.md](methods.md) says which method to take when.",
        "",
        f"Of {len(rows)} claims {summary}." if rows else "None has run yet.",
    ]
    for method in dict.fromkeys(gate.method for gate, _ in rows):
        lines += [
            "",
            f"## {method}",
            "",
            "| claim | criterion | values | beside | | source |",
            "|---|---|---|---|---|---|",
        ]
        for gate, found in rows:
            if gate.method == method:
                cells = (gate.claim, gate.criterion, values_text(found), beside_text(found), verdict(gate, found))
                lines.append("| " + " | ".join(_cell(text) for text in (*cells, gate.source)) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
