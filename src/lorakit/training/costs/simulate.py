"""One real optimizer step on tensors that have shapes and no memory.

The model's own code, ``lorakit.attach``, the task's loss and the training's own ``Stepper`` run under torch's
``FakeTensorMode``; a second mode around it counts storages and floating-point operations. So the estimate is the step
itself. Questions about values, which such tensors cannot answer, are answered as a usual batch would: every number is
finite, and the supervised positions are as many as the rows have.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakit.adapters import attach
from lorakit.adapters.branches import Active
from lorakit.adapters.capture import shared_of
from lorakit.errors import ModelError
from lorakit.methods import Method, Update
from lorakit.training.costs.parts import Ledger, Memory, Peaks
from lorakit.training.data.batches import Collator
from lorakit.training.data.encode import EncodedRow
from lorakit.training.mode import training_mode
from lorakit.training.packing import PackingCollator
from lorakit.training.plan import Plan
from lorakit.training.spec import TaskSpec
from lorakit.training.stepper import Stepper
from lorakit.training.trial import show_readers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER = "default"
AUTO_CLASSES = {"classification": "AutoModelForSequenceClassification"}
_HEAD = "head"


@dataclass(frozen=True)
class Setup:
    """What is simulated.

    Attributes:
        config: the model's.
        dtype: of the base's weights.
        spec: the task.
        method: what is trained; None for full fine-tuning in place: the base's own parameters, no adapter.
        attaching: the other arguments of ``lorakit.attach``.
        plan: optimizer, micro-batch and the like.
        pad_token_id: what rows are padded with.
        trust_remote_code: let code of the model's repository run.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    spec: TaskSpec
    method: Method | None
    attaching: dict[str, Any]
    plan: Plan
    pad_token_id: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Cost:
    """What one optimizer step of one kind of training takes.

    Attributes:
        peaks: memory; with more than one micro-batch, of one that is not the first.
        num_trainable: numbers that are trained.
        trained_bytes: of the parameters that are trained.
        saved_bytes: of the tensors of the adapter's file.
        state_bytes: of the optimizer's state.
        flops: of one micro-batch, forward and backward.
    """

    peaks: Peaks
    num_trainable: int
    trained_bytes: int
    saved_bytes: int
    state_bytes: int
    flops: int

    @property
    def memory(self) -> Memory:
        """The peak of the step."""
        return self.peaks.highest

    def extended(self, other: Cost, factor: float) -> Cost:
        """Go on along the line from here through ``other``."""
        names = ("num_trainable", "trained_bytes", "saved_bytes", "state_bytes", "flops")
        values = {n: round(getattr(self, n) + factor * (getattr(other, n) - getattr(self, n))) for n in names}
        return Cost(self.peaks.extended(other.peaks, factor), **values)


def simulate(setup: Setup, rows: Sequence[EncodedRow]) -> Cost:
    """Simulate one optimizer step after the first, when the optimizer has its state.

    Args:
        setup: what is trained and how.
        rows: one micro-batch. If the plan's batch is larger, gradients of one before are there already.

    Raises:
        ModelError: the model's code asks for values in a way that cannot be answered without any.
        InputError: the adapter cannot be attached.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    task = setup.spec.kind
    ledger = SimulatedStep(sum(task.units(row) for row in rows), _outputs(setup, len(rows)))
    try:
        several = _packs(setup, rows)
        with warnings.catch_warnings(), _texts_of_a_row(several), FakeTensorMode(allow_non_fake_inputs=True):
            # Copying a module asks for the addresses of its tensors, which are none here.
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            model = build(setup)
            weights = _bytes(model)
            with ledger:
                return _step(setup, model, rows, ledger, weights)
    except RuntimeError as error:  # torch's own for questions about values, and kernels without shapes alone
        raise ModelError(
            f"a step of {setup.config.model_type} cannot be simulated: its code chooses what it computes by values, or "
            f"uses an operation that torch cannot run without them ({str(error).splitlines()[0]}). Train with "
            "max_steps 1 to see what it takes."
        ) from error


def build(setup: Setup) -> nn.Module:
    """Return the frozen model of a config, in the mode that is on."""
    import transformers

    from lorakit.bases.quiet import quiet_transformers

    seq2seq = bool(setup.config.is_encoder_decoder)
    usual = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    auto: Any = getattr(transformers, AUTO_CLASSES.get(setup.spec.task, usual))
    with quiet_transformers():
        model: nn.Module = auto.from_config(setup.config, dtype=setup.dtype, trust_remote_code=setup.trust_remote_code)
    return model.requires_grad_(False).eval()


class SimulatedStep(Ledger):  # type: ignore[no-untyped-call]
    """Count storages and operations of a step without values, and answer what only values could.

    Attributes:
        flops: multiplications and additions of matrix products so far.
    """

    def __init__(self, num_units: int, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.num_units, self.outputs = num_units, outputs
        self.flops = 0
        self.in_step = self.in_forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        from torch.utils.flop_counter import flop_registry

        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return _usual_value(args[0])
        if func in (aten.index.Tensor, aten._index_put_impl_.default, aten.index_put.default, aten.index_put_.default):
            args = (args[0], self._positions(args[1]), *args[2:])
        before, known = self.num_events, self.num_storages
        grouped = func is aten._grouped_mm.default
        result = super().__torch_dispatch__(_grouped_product if grouped else func, types, args, kwargs)
        if grouped:
            self.flops += 2 * args[0].numel() * args[1].shape[-1] // (len(args[0]) if args[0].dim() == 3 else 1)
        packet = aten.addmm if func is aten.addmm_.default else func._overloadpacket  # torch counts no product in place
        count = flop_registry.get(packet)
        if count is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=result))
        if self.in_step and any(self._is_logits(leaf) for leaf in tree_leaves(result)):
            self.name(result, "logits", since=known)
            if self.in_forward:
                self.in_forward = False
                self.begin("loss", before)
        return result

    def _is_logits(self, leaf: Any) -> bool:
        """Tell by the shape: scores of all words for many positions, or of all classes for each row."""
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2:
            return False
        return tuple(leaf.shape[-len(self.outputs) :]) == self.outputs

    def _positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Turn a mask into as many positions as there are supervised ones, which is what the operation does inside."""
        found: list[Tensor | None] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                found += [torch.zeros(self.num_units, dtype=torch.int64, device=index.device) for _ in index.shape]
            else:
                found.append(index)
        return found


def _step(setup: Setup, model: nn.Module, rows: Sequence[EncodedRow], ledger: SimulatedStep, weights: int) -> Cost:
    """Attach, give the optimizer its state, and take a step."""
    ledger.label = "adapter"
    handle: Any = InPlace(model) if setup.method is None else attach(model, setup.method, blank=True, **setup.attaching)
    accumulates = setup.plan.batch_size > len(rows)
    plan = replace(setup.plan, micro_batch=len(rows), compile=False)
    ledger.label = "activations"
    padded = setup.spec.kind.collator(setup.pad_token_id)
    stepper = Stepper(handle, ADAPTER, setup.spec.kind, padded, plan)
    batching: Any = _collate(PackingCollator(padded) if plan.packing else padded)
    stepper.batching = batching
    stepper.shortcuts = stepper.task.possible_shortcuts(model)  # they cannot be tried without values
    flops = ledger.flops
    show_readers(handle, stepper.task, padded, rows, stepper.parameters)
    ledger.flops = flops  # not the step's
    num_done = 0

    def arrived(parameter: Tensor) -> None:
        nonlocal num_done
        ledger.name(parameter.grad, "gradients")
        num_done += 1
        if num_done == -(-len(stepper.parameters) // 2):
            ledger.begin("backward")

    ledger.label = "gradients"
    for parameter in stepper.parameters:
        parameter.grad = torch.zeros_like(parameter)
    ledger.label = "optimizer"
    stepper.optimizer.step()
    if not accumulates:
        stepper.optimizer.zero_grad(set_to_none=True)
    ledger.label = "activations"
    for parameter in stepper.parameters:
        parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
    with in_training_mode(model, setup.plan):
        ledger.begin("forward")
        ledger.in_step = ledger.in_forward = True
        loss = stepper.gradients(rows)
        ledger.in_step = False
        if num_done < -(-len(stepper.parameters) // 2):
            ledger.begin("backward")
        ledger.begin("update")
        stepper.settle(loss)
    state = [value for entry in stepper.optimizer.state.values() for value in entry.values()]
    trained = sum(parameter.nbytes for parameter in stepper.parameters)
    return Cost(
        ledger.peaks(weights),
        sum(parameter.numel() for parameter in stepper.parameters),
        trained,
        trained + _saved_beside(handle.updates(ADAPTER)),
        sum(value.nbytes for value in state if isinstance(value, Tensor)),
        ledger.flops,
    )


def _saved_beside(updates: Mapping[str, Update]) -> int:
    """Return the bytes that the adapter's file has beside the trained parameters, such as a frozen start's."""
    beside = sum(tensor.nbytes for shared in shared_of(updates)[:1] for tensor in shared.tensors().values())
    for update in updates.values():
        own = sum(parameter.nbytes for parameter in update.parameters(recurse=False))
        beside += sum(tensor.nbytes for tensor in update.tensors().values()) - own
    return beside


@contextlib.contextmanager
def in_training_mode(model: Any, plan: Plan) -> Iterator[None]:
    """Put the model in the mode that the training loop does, and in evaluation mode afterwards."""
    from lorakit.bases.quiet import quiet_transformers

    with quiet_transformers(), training_mode(model, plan.grad_checkpointing, plan.recompute):
        yield


@contextlib.contextmanager
def _texts_of_a_row(several: bool) -> Iterator[None]:
    """Answer what transformers reads off the positions where there is no mask: whether several texts share a row."""
    from transformers import masking_utils

    asked = "find_packed_sequence_indices"
    original = getattr(masking_utils, asked, None)  # older versions do not ask
    if original is not None:
        setattr(masking_utils, asked, torch.zeros_like if several else lambda position_ids: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(masking_utils, asked, original)


def _packs(setup: Setup, rows: Sequence[EncodedRow]) -> bool:
    """Tell whether the rows of the micro-batch share sequences."""
    padded = setup.spec.kind.collator(setup.pad_token_id)
    return setup.plan.packing and PackingCollator(padded).filled([len(row.input_ids) for row in rows]) is not None


class InPlace:
    """Full fine-tuning as it is usual: the model's own parameters are trained, with no copy and no way back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(True)
        self.method = _no_updates()
        self.active = Active()

    def entry(self, name: str) -> InPlace:
        """Return what says the method."""
        return self

    def updates(self, name: str) -> dict[str, Any]:
        """Return no updates."""
        return {}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return the model's parameters, tied ones once."""
        return dict(self.model.named_parameters())


def _no_updates() -> Method:
    from lorakit.methods.full import Full

    return Full()


def _collate(collator: Collator | PackingCollator) -> Any:
    """Leave the mask of a batch without padding away: transformers does so, but only where there are values."""

    def collate(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        batch = collator(rows)
        if all(len(row.input_ids) == batch["input_ids"].shape[1] for row in rows):
            batch.pop("attention_mask", None)
        return batch

    return collate


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Return what holds the products of groups of rows or columns, one matrix each.

    torch computes them in any dtype, but says their shape in bf16 alone.
    """
    if a.dim() == b.dim():
        groups = len(offs) if a.dim() == 2 and offs is not None else len(a)
        return a.new_empty(groups, a.shape[-2], b.shape[-1])
    return a.new_empty(a.shape[-2], b.shape[-1])


def _usual_value(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _outputs(setup: Setup, num_rows: int) -> tuple[int, ...]:
    """Return the last dimensions of logits."""
    if setup.spec.labels:
        return num_rows, len(setup.spec.labels)
    return (int(setup.config.get_text_config().vocab_size),)


def _bytes(model: nn.Module) -> int:
    tensors = {id(t.untyped_storage()): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
