"""Step time and memory of lorakit and PEFT, on the same model and the same batch.

Each measurement runs in a process of its own, so that neither library warms anything up for the other;
the processes take turns, and a ratio is taken within each turn. A step is forward, backward, AdamW.
Memory is what tensors take at the peak of a step above the loaded model (every storage that an
operation makes is counted while it lives). The frozen base's own forward and backward to its inputs, which no
adapter can beat, stands beside them.

    python benchmarks/bench_step.py [--turns 5] [--steps 12] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "llama 33M, 4 x 256": {"model": "llama", "batch": [4, 256]},
    "llama 33M, 4 x 256, bf16": {"model": "llama", "batch": [4, 256], "dtype": "bf16"},
    "llama 33M, 4 x 256, dropout 0.1": {"model": "llama", "batch": [4, 256], "dropout": 0.1},
    "llama 33M, 4 x 256, DoRA": {"model": "llama", "batch": [4, 256], "dora": True},
    "BERT (MiniLM's shape), 16 x 24": {"model": "bert", "batch": [16, 24]},
    "Mixtral-like 27M, 4 x 128": {"model": "mixtral", "batch": [4, 128]},
}
LIBRARIES = ("lorakit", "peft", "base")
RANK, ALPHA = 8, 16
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def build(case: dict[str, Any]) -> Any:
    """Return a frozen model with random weights of a real shape."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    if case["model"] == "bert":
        config: Any = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12, num_labels=6
        )
        model: Any = BertForSequenceClassification(config)
    elif case["model"] == "mixtral":
        config = MixtralConfig(
            hidden_size=384,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_local_experts=8,
            vocab_size=4096,
            max_position_embeddings=512,
        )
        model = MixtralForCausalLM(config)
    else:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=8192,
            max_position_embeddings=512,
        )
        model = LlamaForCausalLM(config)
    dtype = {"bf16": torch.bfloat16}.get(case.get("dtype", ""), torch.float32)
    return model.to(dtype).requires_grad_(False)


def adapt(model: Any, library: str, case: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Adapt every linear layer of the body and return the model and what is trained."""
    head = ["classifier"] if case["model"] == "bert" else []
    dropout, dora = case.get("dropout", 0.0), case.get("dora", False)
    if library == "lorakit":
        import lorakit as lk

        kind = lk.DoRA if dora else lk.LoRA
        handle = lk.attach(model, kind(rank=RANK, alpha=ALPHA, dropout=dropout), train_modules=head, seed=0)
        return model, list(handle.parameters().values())
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            use_dora=dora,
            target_modules="all-linear",
            target_parameters=EXPERTS if case["model"] == "mixtral" else None,
            modules_to_save=head or None,
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
        )
        wrapped = get_peft_model(model, config)
        return wrapped, [p for p in wrapped.parameters() if p.requires_grad]
    return model, []


def make_step(model: Any, parameters: list[Any], case: dict[str, Any]) -> tuple[Callable[[], float], Any]:
    """Return a function that takes one training step, and the optimizer (None for the base alone)."""
    import torch
    from torch.nn import functional as F

    rows, width = case["batch"]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, model.config.vocab_size, (rows, width), generator=generator)
    labels = torch.randint(6, (rows,), generator=generator)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True) if parameters else None
    embedding = model.get_input_embeddings()

    def loss_of() -> Any:
        if optimizer is None:  # the least that any adapter needs: gradients down to the inputs
            embedded = embedding(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded).logits
        else:
            logits = model(input_ids=ids).logits
        if case["model"] == "bert":
            return F.cross_entropy(logits.float(), labels)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def step() -> float:
        loss = loss_of()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, optimizer


def measure(library: str, case: dict[str, Any], steps: int) -> dict[str, float]:
    """Measure one library on one case in this process."""
    import warnings

    import torch

    from lorakit.training.memory import peak_bytes

    warnings.simplefilter("ignore")
    model, parameters = adapt(build(case), library, case)
    model.train()
    step, _ = make_step(model, parameters, case)
    memory = peak_bytes(step, torch.device("cpu"))  # the first step: gradients and AdamW's state are made in it
    step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "bytes": float(memory),
        "loss": loss,
        "trained": sum(p.numel() for p in parameters),
    }


def compare(case: dict[str, Any], turns: int, steps: int) -> dict[str, Any]:
    """Let the libraries take turns, a process each, and return medians and ratios."""
    found: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for turn in range(turns):
        order = LIBRARIES if turn % 2 == 0 else tuple(reversed(LIBRARIES))
        for library in order:
            command = [sys.executable, __file__, "--worker", library, json.dumps(case), "--steps", str(steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[library].append(json.loads(output.splitlines()[-1]))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found["lorakit"], found["peft"], strict=True)]
    limits = [a["seconds"] / b["seconds"] for a, b in zip(found["lorakit"], found["base"], strict=True)]
    return {
        **{f"{library}_ms": 1e3 * statistics.median(m["seconds"] for m in found[library]) for library in LIBRARIES},
        **{f"{library}_mib": found[library][0]["bytes"] / 2**20 for library in LIBRARIES},
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "memory_ratio": found["lorakit"][0]["bytes"] / found["peft"][0]["bytes"],
        "over_base": statistics.median(limits),
        "trained": [found["lorakit"][0]["trained"], found["peft"][0]["trained"]],
    }


def main() -> None:
    """Run every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("LIBRARY", "CASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.worker[0], json.loads(given.worker[1]), given.steps)))
        return
    results = {name: compare(case, given.turns, given.steps) for name, case in CASES.items() if given.only in name}
    if given.json:
        print(json.dumps(results, indent=2))
        return
    print("rank 8 on all linear layers, AdamW; medians; ratio = lorakit / PEFT, below 1 is better\n")
    heads = ("lorakit", "PEFT", "ratio (range)", "over base", "memory MiB (ours / PEFT)")
    print(f"{'case':34} {heads[0]:>9} {heads[1]:>9} {heads[2]:>20} {heads[3]:>10}   {heads[4]:>26}")
    for name, r in results.items():
        low, high = r["time_ratio_range"]
        print(
            f"{name:34} {r['lorakit_ms']:6.0f} ms {r['peft_ms']:6.0f} ms {r['time_ratio']:7.3f} ({low:.3f}-{high:.3f}) "
            f"{r['over_base']:9.3f}   {r['lorakit_mib']:7.1f} / {r['peft_mib']:5.1f} = {r['memory_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
