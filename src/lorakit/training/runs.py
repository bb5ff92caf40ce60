"""Using what a run left behind: measure, predict, generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters import AdapterState, Handle
from lorakit.bases import Base, context_length, is_chat_model, load_base, load_tokenizer, model_kind
from lorakit.errors import InputError, RunFolderError
from lorakit.formats.store import load_adapter, read_adapter
from lorakit.records import Evaluation
from lorakit.text import generate as writing
from lorakit.text.supervise import instruction_prompt
from lorakit.training.checkpoint import FOLDER as CHECKPOINTS
from lorakit.training.checkpoint import Checkpoints
from lorakit.training.config import read_config
from lorakit.training.data.encode import EncodedSet
from lorakit.training.data.read import read_table
from lorakit.training.data.table import Table
from lorakit.training.run_files import is_unfinished, read_spec
from lorakit.training.scores import probabilities
from lorakit.training.spec import TaskSpec
from lorakit.training.vocabulary import in_run

if TYPE_CHECKING:
    from collections.abc import Iterator

TASK_OF_PEFT = {"SEQ_CLS": "classification", "CAUSAL_LM": "generation", "SEQ_2_SEQ_LM": "generation"}


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one text: its label, and every class's probability by name."""

    text: str
    label: str
    probabilities: dict[str, float]


@dataclass
class Run:
    """An opened run: the base with its adapter acting, and the task.

    Attributes:
        base: the model and its tokenizer.
        handle: the adapters on it.
        spec: the task.
        folder: where the adapter came from.
    """

    base: Base
    handle: Handle
    spec: TaskSpec
    folder: Path

    def read(self, data: str | Path | Table) -> EncodedSet:
        """Read rows with answers for this run's task."""
        table = data if isinstance(data, Table) else read_table(data)
        return self.spec.read(table, self.base.tokenizer)

    def evaluate(self, data: str | Path | Table) -> tuple[Evaluation, tuple[str, ...]]:
        """Measure the run on rows; return the scores, and notes such as rows left out."""
        encoded = self.read(data)
        collate = self.spec.collator(self.base.tokenizer)
        return self.spec.kind.evaluate(self.base.model, encoded.rows, collate), encoded.notes

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[Prediction]:
        """Classify texts, or pairs of texts.

        Raises:
            InputError: the run is not a classifier.
        """
        from lorakit.training.data.encode import EncodedRow

        self._need("classification", "predict", "generate")
        tokenizer: Any = self.base.tokenizer
        rows = []
        for i, text in enumerate(texts):
            parts = (text,) if isinstance(text, str) else text
            found = tokenizer(*parts, truncation=True, max_length=self.spec.max_length)
            types = found.get("token_type_ids") if len(parts) == 2 else None
            rows.append(EncodedRow(found["input_ids"], 0, i + 1, " | ".join(parts), "", types))
        shares = probabilities(self.base.model, rows, self.spec.collator(tokenizer)).tolist() if rows else []
        named = [dict(zip(self.spec.labels, row, strict=True)) for row in shares]
        return [Prediction(row.prompt, max(p, key=lambda k: p[k]), p) for row, p in zip(rows, named, strict=True)]

    def too_long(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[int]:
        """Return the numbers, from 1, of the texts that :meth:`predict` cuts to the run's length."""
        tokenizer: Any = self.base.tokenizer
        lengths = [
            len(tokenizer(*((text,) if isinstance(text, str) else text), verbose=False)["input_ids"]) for text in texts
        ]
        return [i for i, length in enumerate(lengths, start=1) if length > self.spec.max_length]

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 128, temperature: float = 0.0, seed: int | None = None
    ) -> list[str]:
        """Write on from each prompt, in the form that training used."""
        self._need_writer()
        return writing.generate(
            self.base.model,
            self.base.tokenizer,
            [self.worded(prompt) for prompt in prompts],
            max_new_tokens,
            chat=self.spec.chat,
            temperature=temperature,
            seed=seed,
            separator=self.separator,
        )

    def stream(
        self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[str]:
        """Write on from a prompt, piece by piece."""
        self._need_writer()
        return writing.stream(
            self.base.model,
            self.base.tokenizer,
            self.worded(prompt),
            max_new_tokens,
            chat=self.spec.chat,
            temperature=temperature,
            seed=seed,
            separator=self.separator,
        )

    def worded(self, prompt: str) -> str:
        """Return the prompt as the training rows worded theirs."""
        plain_instruction = self.spec.layout == "instruction-output" and not self.spec.chat
        return instruction_prompt(prompt) if plain_instruction else prompt

    @property
    def separator(self) -> str:
        """What stands between a prompt and what is written: nothing after plain text."""
        return "" if self.spec.task == "language-modeling" else self.spec.separator

    def _need_writer(self) -> None:
        if self.spec.task == "classification":
            self._need("generation", "generate", "predict")

    def _need(self, task: str, command: str, other: str) -> None:
        if self.spec.task != task:
            raise InputError(f"run '{self.folder}' is for {self.spec.task}; '{command}' needs {task}. Use '{other}'.")


def open_run(
    folder: str | Path,
    base: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] = (),
) -> Run:
    """Open a run folder, or a bare PEFT folder with its base.

    Args:
        folder: a run folder, or a folder with a PEFT adapter.
        base: the base's folder or hub name; needed where the adapter does not say, or where it has moved.
        device: 'auto' takes a GPU if there is one.
        dtype: of the base; None takes the run's, else the checkpoint's.
        trust_remote_code: let code of the model's repository run.
        labels: class names for a bare classifier, in logit order.

    Raises:
        RunFolderError: the folder is missing, or has no adapter.
        BaseMismatchError: the base is another model than the adapter's.
    """
    folder = Path(folder).expanduser()
    check_adapter_folder(folder)
    state = read_adapter(folder)
    settings = read_config(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    name = base or state.base_name
    if not name:
        raise RunFolderError(f"'{folder}' does not say which base it belongs to. Give it with --base MODEL.")
    if base is None and Path(name).is_absolute() and not Path(name).is_dir():
        raise RunFolderError(f"the base of '{folder}', '{name}', is not there any more. Give it with --base MODEL.")
    spec = read_spec(folder) if (folder / "task.json").is_file() else bare_spec(folder, state, labels)
    loaded = load_base(
        name,
        spec.task,
        labels=spec.labels,
        dtype=dtype or str(settings.get("dtype", "auto")),
        device=usable_device() if device == "auto" else device,
        revision=None if Path(name).is_dir() else settings.get("revision"),
        trust_remote_code=trust_remote_code,
        seed=int(settings.get("seed", 0)),
    )
    beside = tokenizer_folder(folder)
    if beside is not None:
        loaded = in_run(loaded, load_tokenizer(str(beside), None, trust_remote_code))
    handle = load_adapter(loaded.model, folder)
    loaded.model.train(False)
    if not (folder / "task.json").is_file():
        spec = completed(spec, loaded)
    return Run(loaded, handle, spec, folder)


def tokenizer_folder(folder: Path) -> Path | None:
    """Return where the tokenizer of a run, or of the run that a checkpoint belongs to, is kept; None where nowhere."""
    places = [folder, folder.absolute().parent.parent] if folder.absolute().parent.name == CHECKPOINTS else [folder]
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), None)


def check_adapter_folder(folder: Path) -> None:
    """Raise a RunFolderError where there is no adapter, naming what is near or what is there instead."""
    from lorakit.errors import did_you_mean

    if not folder.is_dir():
        beside = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise RunFolderError(f"there is no run folder '{folder}'.{did_you_mean(folder.name, beside)}")
    if not (folder / "adapter_config.json").is_file():
        hint = ""
        if (folder / "config.json").is_file():
            hint = " It is a model; give the folder that `lorakit train` wrote."
        elif is_unfinished(folder):
            hint = f" Its run has not come to its end. Go on with it: lorakit resume {folder}"
            names = Checkpoints(folder).names()
            hint += f", or use '{folder / CHECKPOINTS / names[0]}' as it is." if names else "."
        raise RunFolderError(f"'{folder}' has no adapter (no adapter_config.json).{hint}")


def bare_spec(folder: Path, state: AdapterState, labels: Sequence[str]) -> TaskSpec:
    """Guess the task of a bare PEFT folder from its config and its head."""
    import json

    word = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    task = TASK_OF_PEFT.get(str(word), "generation")
    if task != "classification":
        return TaskSpec(task)
    heads = [t for tensors in state.modules.values() for key, t in tensors.items() if key == "weight" and t.dim() == 2]
    # Beside the head there may be a pooler, which is wider than any usual number of classes.
    count = min(head.shape[0] for head in heads) if heads else 2
    names = tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))
    if len(names) != count:
        raise InputError(f"'{folder}' has {count} classes, but {len(names)} labels were given.")
    return TaskSpec(task, labels=names)


def completed(spec: TaskSpec, base: Base) -> TaskSpec:
    """Fill in what only the model knows."""
    import dataclasses

    return dataclasses.replace(
        spec,
        max_length=min(context_length(base.model, base.tokenizer), 2048),
        chat=spec.task == "generation" and is_chat_model(base.tokenizer, base.model),
        encoder_decoder=model_kind(base.model.config) == "encoder-decoder",
    )


def usable_device() -> str:
    """Return 'cuda' where there is a GPU, else 'cpu'."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
