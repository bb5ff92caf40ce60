"""Merging a run into a plain model folder, with proof that nothing else changed.

The merge is computed in fp32 from the stored weights and compared, in fp32, with the unmerged model on
probe inputs; then each weight is rounded once to the checkpoint's own dtype, and what that rounding does
to the outputs is measured and reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.adapters.identity import base_buffers, base_parameters
from lorakit.bases import check_free, describe_model, load_base, save_model
from lorakit.bases.source import local_folder
from lorakit.errors import ConfigError, MergeToleranceError, RunFolderError, did_you_mean, quoted
from lorakit.text.generate import evaluating
from lorakit.training.proof import tolerance
from lorakit.training.runs import Run, open_run

PROBE_ROWS, PROBE_LENGTH = 8, 32
_STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        output: the model folder written.
        num_merged: base tensors that changed.
        untied: tensors that were tied to another and now stand alone.
        max_difference: max |merged - unmerged| of the outputs in fp32, and ``tolerance`` the bound on it.
        dtype: what the folder stores.
        rounding_kl: mean KL divergence in nats from the fp32 outputs to those of the stored weights.
        rounding_top1: share of outputs whose largest entry is the same.
        reloaded: the written folder was loaded again and its outputs equal the stored weights' ones.
    """

    output: str
    num_merged: int
    untied: tuple[str, ...]
    max_difference: float
    tolerance: float
    dtype: str
    rounding_kl: float
    rounding_top1: float
    reloaded: bool


def merge_run(
    folder: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    dtype: str = "auto",
    force: bool = False,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a run's adapter and write a plain model folder that ``transformers`` loads.

    Args:
        folder: a run folder, or a PEFT folder with ``base``.
        output: where the model goes; must not exist unless ``force``.
        base: the base's folder or hub name, if the run does not say or it has moved.
        dtype: what to store: 'auto' is the checkpoint's own.
        force: replace a model that is there.
        trust_remote_code: let code of the model's repository run.

    Raises:
        MergeToleranceError: merged and unmerged outputs differ by more than the bound; nothing is written.
        RunFolderError: the output exists.
    """
    if dtype not in ("auto", *_TORCH):
        raise ConfigError(f"unknown dtype '{dtype}'.{did_you_mean(dtype, _TORCH)} Known: {quoted(['auto', *_TORCH])}.")
    check_free(output, force)
    run = open_run(folder, base, device="cpu", dtype="fp32", trust_remote_code=trust_remote_code)
    model: Any = run.base.model
    if Path(output).expanduser().resolve() == Path(run.base.name).expanduser().resolve():
        raise RunFolderError(f"'{output}' is the base itself, which the adapter goes on needing. Give another folder.")
    stored = stored_dtype(run.base.name) if dtype == "auto" else dtype
    inputs = probe_inputs(run)
    unmerged = logits_of(model, inputs)
    merged = run.handle.merge(keep="none")
    found = logits_of(model, inputs)
    difference, bound = float((found - unmerged).abs().max()), tolerance(unmerged)
    if not difference <= bound:
        raise MergeToleranceError(
            f"merged and unmerged outputs differ by {difference:.3g}, more than {bound:.3g}: nothing was written. "
            "The adapter may be far larger than the base's weights, or this model reads weights in its own way."
        )
    run.handle.bake()
    if merged.untied:
        model.config.tie_word_embeddings = False
    _round_stored(model, _TORCH[stored])
    rounded = logits_of(model, inputs)
    kl, top1 = divergence(found, rounded)
    written = save_model(model, run.base.tokenizer, output, force=force)
    return MergeReport(
        output=str(written),
        num_merged=len(merged.names),
        untied=tuple(merged.untied),
        max_difference=difference,
        tolerance=bound,
        dtype=stored,
        rounding_kl=kl,
        rounding_top1=top1,
        reloaded=same_again(written, run, rounded, inputs, trust_remote_code),
    )


def _round_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Round in place what a checkpoint holds; other buffers (positions' frequencies) stay in fp32."""
    for _, tensor in [*base_parameters(model), *base_buffers(model)]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def stored_dtype(name: str) -> str:
    """Return the dtype most of a checkpoint's numbers are stored in; 'fp32' where it cannot be told."""
    folder = local_folder(name)
    return "fp32" if folder is None else _STORED.get(describe_model(folder).dtype, "fp32")


def probe_inputs(run: Run) -> dict[str, Tensor]:
    """Return token ids that every vocabulary has, drawn with a fixed seed, ``[8, 32]``."""
    model: Any = run.base.model
    vocabulary = int(model.config.get_text_config().vocab_size)
    length = max(2, min(PROBE_LENGTH, run.spec.max_length))
    ids = torch.randint(vocabulary, (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0))
    end = model.config.eos_token_id
    if isinstance(end, int):  # some classifiers read what is at the one end of sequence
        ids = torch.where(ids == end, (end + 1) % vocabulary, ids)
        ids[:, -1] = end
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if run.spec.encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's logits in fp32."""
    with evaluating(model):
        logits: Tensor = model(**inputs).logits
    return logits.float()


def divergence(exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Return the mean KL divergence in nats, and the share of equal top-1 choices."""
    p, q = exact.flatten(0, -2).log_softmax(-1), rounded.flatten(0, -2).log_softmax(-1)
    kl = float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
    return max(kl, 0.0), float((p.argmax(-1) == q.argmax(-1)).float().mean())


def same_again(folder: Path, run: Run, expected: Tensor, inputs: dict[str, Tensor], trust_remote_code: bool) -> bool:
    """Load the written folder and compare its outputs with ``expected``, up to the order of sums."""
    again = load_base(
        str(folder), run.spec.task, labels=run.spec.labels, dtype="auto", trust_remote_code=trust_remote_code
    )
    found = logits_of(again.model, inputs)
    return not again.new_modules and bool(torch.allclose(found, expected, rtol=1e-5, atol=1e-5))
