"""What the loop is told (``Plan``), where it stands (``Progress``), and what it has done (``Outcome``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorakit.adapters import AdapterState
from lorakit.records import Evaluation
from lorakit.training.diagnosis import Setting
from lorakit.training.schedule import WARMUP_SHARE, Schedule


@dataclass(frozen=True)
class Plan:
    """What the loop needs to know.

    Attributes:
        num_steps: optimizer steps.
        batch_size: rows per step; ``micro_batch`` of them at a time in memory.
        lr, weight_decay: of the optimizer; ``clip_norm`` the largest gradient norm.
        seed: of the order of the rows.
        dtype: of the base; with 'fp16' the loss is scaled, so that small gradients survive in the activations.
        optimizer, schedule, warmup: see ``lorakit.training.optimizers`` and :class:`Schedule`.
        eval_every: steps between two evaluations; None measures at the end of each epoch.
        save_every: steps between two checkpoints; None saves after each evaluation and every ten minutes.
        patience: evaluations without a better one after which the run ends; None for none.
        packing: several examples make one sequence, see ``lorakit.training.packing``.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them.
        recompute: make what cheap operations made again in the backward pass.
        compile: run the model's blocks through ``torch.compile``, see ``lorakit.training.compiling``.
        halve_micro_at: the step from which ``micro_batch`` is half of it, because memory ran out there before.
        usual_lr: what the recipe would take as ``lr``; None where it is not known.
    """

    num_steps: int
    batch_size: int
    micro_batch: int
    lr: float
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    dtype: str = "fp32"
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = WARMUP_SHARE
    eval_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    packing: bool = False
    grad_checkpointing: bool = False
    recompute: bool = False
    compile: bool = False
    halve_micro_at: int | None = None
    usual_lr: float | None = None

    @property
    def rates(self) -> Schedule:
        """The factor on the learning rate at each step."""
        return Schedule(self.schedule, self.num_steps, self.warmup)

    @property
    def setting(self) -> Setting:
        """What the diagnosis must know."""
        usual = self.usual_lr if self.usual_lr is not None else self.lr
        return Setting(self.lr, usual, self.num_steps, self.rates.num_warmup, self.dtype, self.patience)


@dataclass
class Progress:
    """Where a run stands between two steps: all but tensors that a resumed run must know.

    Attributes:
        step: optimizer steps taken; ``epoch`` and ``batch`` are where the next one takes its rows.
        tokens, seconds: input tokens seen, and training time without validation.
        micro_batch: rows at a time now; ``halved`` if that is half of what was planned.
        unmeasured: an evaluation is due at this step.
        best_step, best_measure: where the adapter was best on the validation rows, and what was measured there.
        since_best: evaluations since then.
        num_lines: lines of metrics so far.
    """

    micro_batch: int
    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    halved: bool = False
    unmeasured: bool = False
    best_step: int = 0
    best_measure: Evaluation | None = None
    since_best: int = 0
    num_lines: int = 0


@dataclass
class Outcome:
    """What the loop did.

    Attributes:
        steps: optimizer steps taken; ``epochs`` passes over the rows.
        seconds, tokens: training time without validation, and input tokens in it.
        best: the adapter that was best on the validation rows, ``best_step`` where it was, and ``best_measure`` what
            was measured there; None if nothing was measured.
        interrupted: ended by a signal; ``early`` ended because nothing became better.
        metrics: lines for ``metrics.jsonl``.
        notes: what the diagnosis has to say.
    """

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    best: AdapterState | None = None
    best_step: int = 0
    best_measure: Evaluation | None = None
    interrupted: bool = False
    early: bool = False
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
