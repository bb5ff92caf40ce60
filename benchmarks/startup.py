"""How long it takes until lorakit is there: ``import lorakit`` beyond torch, ``lorakit --help``, the first step.

Each figure is the median over several new processes; the first, with cold files, is not counted. The first step is that
of a new process that trains a tiny LLaMA on 200 rows, from its start to the end of its first optimizer step: with
``lorakit.fit``, which looks at rows and base before, and with HF's Trainer and PEFT, which do not.

    python benchmarks/startup.py --runs 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
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
MODEL = """
import sys, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(200))])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(sys.argv[1])
config = transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4,
    num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=2)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
ROWS = """
rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(0, 195)]
"""
OUR_STEP = (
    ROWS
    + """
import os, sys, time
import lorakit
from lorakit.training.observe import Observer
class Watch(Observer):
    def step(self, step):
        print(time.time(), flush=True)
        os._exit(0)
lorakit.fit(sys.argv[1], rows, max_steps=2, observer=Watch())
"""
)
TRAINERS_STEP = (
    ROWS
    + """
import os, sys, tempfile, time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
class Watch(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print(time.time(), flush=True)
        os._exit(0)
encoded = [tokenizer(row["prompt"] + " " + row["completion"])["input_ids"] for row in rows]
data = [{"input_ids": ids, "labels": ids} for ids in encoded]
collate = lambda part: {key: torch.tensor([row[key] for row in part]) for key in ("input_ids", "labels")}
settings = TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
Trainer(model, settings, collate, data, callbacks=[Watch()]).train()
"""
)

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


def seconds_to_step(program: str, model: str) -> float:
    """Return the seconds from starting a new process until the end of its first training step."""
    start = time.time()
    command = [sys.executable, "-W", "ignore", "-c", program, model]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) - start


def measure(runs: int, model: str) -> dict[str, list[float]]:
    """Measure each figure ``runs`` times, in turn, so that a slow moment of the machine meets them all."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", MODEL, model], check=True)
    figures = {
        "import lorakit, beyond torch": lambda: printed_seconds(IMPORT_AFTER_TORCH),
        "lorakit --help": lambda: wall_seconds(HELP),
        "python itself": lambda: wall_seconds(EMPTY),
        "first step, lorakit.fit": lambda: seconds_to_step(OUR_STEP, model),
        "first step, Trainer + PEFT": lambda: seconds_to_step(TRAINERS_STEP, model),
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
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options.runs, folder)
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
