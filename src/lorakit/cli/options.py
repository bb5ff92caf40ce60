"""Arguments and options that several commands share, and those of ``train``."""

from __future__ import annotations

from typing import Annotated

import typer

WHAT = "What is trained"
HOW_LONG = "How it is trained"
ROWS = "Data"
MACHINE = "Machine"
SOURCE = "Model source"
RESULT = "Output"

RunFolder = Annotated[
    str,
    typer.Argument(metavar="RUN", help="The folder that `lorakit train` wrote, or a PEFT folder.", show_default=False),
]
AnsweredRows = Annotated[str, typer.Argument(metavar="DATA", help="A file of rows with answers.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The base model, where the run does not say or it has moved."),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Class names in logit order, for a PEFT classifier that has none."),
]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', ...; 'auto' takes a GPU if there is one.")]
BaseDtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the base's weights: fp32, bf16, fp16; else the run's own.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code of the model's repository run. Read it first.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at the output.")]

# train: None means that the flag was not given, so that the config file or the recipe decides.
TrainModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hugging Face hub.", show_default=False)
]
TrainData = Annotated[
    str | None,
    typer.Argument(
        metavar="DATA",
        help="Rows: .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt (also .gz, .zst), a folder with train (and "
        "validation), a saved dataset, or a dataset's name on the Hugging Face hub.",
        show_default=False,
    ),
]
TrainOutput = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="RUN", help="The run folder; else runs/MODEL-DATA, numbered.", rich_help_panel=RESULT
    ),
]
TrainForce = Annotated[
    bool | None, typer.Option("--force", help="Replace an existing run folder.", rich_help_panel=RESULT)
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Show remarks, the result on one line and the run folder only.", rich_help_panel=RESULT
    ),
]
TrainJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the summary as JSON on stdout, and events as lines of JSON on stderr.",
        rich_help_panel=RESULT,
    ),
]
LogTo = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Send the metrics to tensorboard (files in RUN/logs), wandb or others that accelerate knows, too.",
        rich_help_panel=RESULT,
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML with any of these settings; flags win.", rich_help_panel=RESULT
    ),
]
Task = Annotated[
    str | None,
    typer.Option(help="classification, generation or language-modeling; else by the columns.", rich_help_panel=WHAT),
]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="Fine-tuning method; see `lorakit methods`; else lora.", rich_help_panel=WHAT),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto", help="Rank of each update; 'auto' chooses by layer, within --budget.", rich_help_panel=WHAT
    ),
]
Alpha = Annotated[float | None, typer.Option(help="The update's scale is alpha / rank.", rich_help_panel=WHAT)]
Init = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How each update starts: pissa, olora, orthogonal, ...; else kaiming.",
        rich_help_panel=WHAT,
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="With --rank auto, adalora, increlora: numbers of all updates.", rich_help_panel=WHAT
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Layers by name, suffix, glob or 're:...', or the words attention, mlp, all-linear; comma-separated.",
        rich_help_panel=WHAT,
    ),
]
Exclude = Annotated[str | None, typer.Option(help="Layers to leave out, like --targets.", rich_help_panel=WHAT)]
Layers = Annotated[str | None, typer.Option(help="Blocks to keep: 0-5 or last:4.", rich_help_panel=WHAT)]
TrainModules = Annotated[
    str | None,
    typer.Option(help="Modules to train in full, beside a new head; comma-separated.", rich_help_panel=WHAT),
]
AddTokens = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|A,B,...",
        help="Tokens that tokenizer and model learn first: a file with one in each line, or a list.",
        rich_help_panel=WHAT,
    ),
]
TrainVocabulary = Annotated[
    str | None,
    typer.Option(
        metavar="new|full|none",
        help="Train the rows of new tokens (usual where there are any), all of embedding and head, or none of them.",
        rich_help_panel=WHAT,
    ),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the rows.", rich_help_panel=HOW_LONG)]
MaxSteps = Annotated[int | None, typer.Option(help="End after so many steps.", rich_help_panel=HOW_LONG)]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD=COLUMN,...",
        help="Which column is which field, as in prompt=question,completion=answer.",
        rich_help_panel=ROWS,
    ),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=HOW_LONG)]
BatchSize = Annotated[int | None, typer.Option(help="Rows per optimizer step.", rich_help_panel=HOW_LONG)]
MicroBatch = Annotated[int | None, typer.Option(help="Rows at a time in memory.", rich_help_panel=HOW_LONG)]
Optimizer = Annotated[str | None, typer.Option(help="adamw, sgd or adafactor; else adamw.", rich_help_panel=HOW_LONG)]
Schedule = Annotated[
    str | None,
    typer.Option(help="Of the learning rate: linear, cosine or constant; else linear.", rich_help_panel=HOW_LONG),
]
Warmup = Annotated[
    float | None,
    typer.Option(help="Steps over which the rate rises, or below 1 their share; else 0.06.", rich_help_panel=HOW_LONG),
]
WeightDecay = Annotated[float | None, typer.Option(help="Of the optimizer; else 0.", rich_help_panel=HOW_LONG)]
ClipNorm = Annotated[float | None, typer.Option(help="Largest gradient norm; else 1.", rich_help_panel=HOW_LONG)]
EvalEvery = Annotated[
    int | None, typer.Option(metavar="STEPS", help="Measure so often; else each epoch.", rich_help_panel=HOW_LONG)
]
Patience = Annotated[
    int | None,
    typer.Option(help="End after so many evaluations without a better one; else never.", rich_help_panel=HOW_LONG),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help="Save a checkpoint so often; else at each evaluation and every ten minutes.",
        rich_help_panel=RESULT,
    ),
]
Keep = Annotated[
    int | None, typer.Option(help="Checkpoints to keep beside the best; else two.", rich_help_panel=RESULT)
]
GradCheckpointing = Annotated[
    bool | None,
    typer.Option("--grad-checkpointing", help="Save memory by computing activations twice.", rich_help_panel=MACHINE),
]
Packing = Annotated[
    str | None,
    typer.Option(
        metavar="auto|on|off",
        help="Several examples in one sequence, none of which sees another; else where it pays.",
        rich_help_panel=MACHINE,
    ),
]
CachePrefix = Annotated[
    bool | None,
    typer.Option(
        "--cache-prefix",
        help="Keep the output of frozen lower blocks on disk, and compute it once for all epochs.",
        rich_help_panel=MACHINE,
    ),
]
Recompute = Annotated[
    str | None,
    typer.Option(
        metavar="auto|on|off",
        help="Make cheap activations again instead of keeping them; else where memory is not ample.",
        rich_help_panel=MACHINE,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile", help="Compile the blocks: faster steps after some 20 s of compiling.", rich_help_panel=MACHINE
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of split, order and starting values.", rich_help_panel=HOW_LONG)]
Validation = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|FILE", help="Share of the rows to validate on, or a file; else 0.1.", rich_help_panel=ROWS
    ),
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per row.", rich_help_panel=ROWS)]
TrainDtype = Annotated[
    str | None, typer.Option("--dtype", help="Of the base's weights: fp32, bf16, fp16.", rich_help_panel=MACHINE)
]
TrainDevice = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...", rich_help_panel=MACHINE)]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.", rich_help_panel=SOURCE)]
TrainTrust = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code", help="Let code of the model's repository run. Read it first.", rich_help_panel=SOURCE
    ),
]


def split_names(text: str | None) -> list[str]:
    """Part names at commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
