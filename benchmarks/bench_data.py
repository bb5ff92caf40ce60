"""Rows per second and peak memory of reading and encoding a large file, the first and the second time.

    python benchmarks/bench_data.py MODEL rows.jsonl --rows 200000

The file's rows are repeated, each with its number in the prompt, until there are enough. Each measurement runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_rows(source: Path, target: Path, count: int) -> None:
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number, row in zip(range(count), itertools.cycle(lines), strict=False):
            file.write(json.dumps({**row, "prompt": f"{number}. {row['prompt']}"}) + "\n")


def measure(model: str, rows: str, chat: bool) -> dict[str, float]:
    from lorakit.bases.tokenizer import load_tokenizer
    from lorakit.training.data.detect import detect_task
    from lorakit.training.data.encode import encode_generation
    from lorakit.training.data.read import read_splits
    from lorakit.training.data.split import split_rows

    tokenizer = load_tokenizer(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    table = read_splits(rows)["train"]
    read = time.perf_counter()
    detection = detect_task(table)
    train, _ = split_rows(table, detection)
    split = time.perf_counter()
    encoded = encode_generation(train, detection, tokenizer, 512, chat)
    done = time.perf_counter()
    tokens = sum(len(row.input_ids) for row in encoded.rows)
    walked = time.perf_counter()
    return {
        "rows": len(encoded.rows),
        "tokens": tokens,
        "read_s": read - start,
        "check_and_split_s": split - read,
        "encode_s": done - split,
        "walk_s": walked - done,
        "rows_per_s": len(encoded.rows) / (done - start),
        "imports_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.model, str(given.data), given.chat)))
        return
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "rows.jsonl")
        write_rows(given.data, large, given.rows)
        print(f"{large.stat().st_size / 2**20:.0f} MiB")
        for name, cache in (("first time", folder), ("second time", folder), ("without cache", "off")):
            command = [sys.executable, __file__, given.model, str(large), "--measure", *(["--chat"] * given.chat)]
            done = subprocess.run(command, env={**os.environ, "LORAKIT_CACHE": cache}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout)
            print(name, {key: round(value, 2) for key, value in found.items()})


if __name__ == "__main__":
    main()
