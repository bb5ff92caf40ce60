"""``lorakit inspect MODEL|RUN|ADAPTER``: what is in a model or an adapter, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli import options, output
from lorakit.errors import ConfigError, ModelError, RunFolderError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from lorakit.bases import ModelOutline
    from lorakit.formats.outline import AdapterOutline


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what is in a model, a run or an adapter.", epilog="Example: lorakit inspect ./my-model"
    )(inspect)


def inspect(
    place: Annotated[
        str,
        typer.Argument(metavar="MODEL|RUN|ADAPTER", help="A folder, or a hub model in the cache.", show_default=False),
    ],
    identity: Annotated[
        bool, typer.Option("--identity", help="Also the base's identity, which needs a model's weights.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show layers with their shapes, the names that targets can use, and sizes, without loading a model.

    Of a run or an adapter: its method, its base, and what each layer learned.
    """
    from lorakit.records import to_json

    folder = find_folder(place, revision)
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
        from lorakit.formats.outline import describe_adapter

        adapter = describe_adapter(folder)
        if as_json:
            output.show_json({"kind": "adapter", **to_json(adapter), "layers": layers_as_json(adapter)})
        else:
            show_adapter(adapter)
        return
    from lorakit.bases import describe_model

    model = describe_model(folder)
    task = "generation" if any("CausalLM" in name for name in model.architectures) else "classification"
    short = base_identity(folder, task) if identity else None
    if as_json:
        found = {"kind": "model", "folder": str(folder), **to_json(model), "target_names": list(model.target_names)}
        known = {"identity": short, "identity_task": task} if identity else {}
        output.show_json({**found, "groups": to_json(model.groups), **known})
    else:
        show_model(model, folder, f"{short}, as the base of {task}" if identity else None)


def find_folder(place: str, revision: str | None) -> Path:
    """Return the folder that was named, or the cached one of a hub model.

    Raises:
        ModelError, RunFolderError: there is none.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"'{place}' is a folder and has no revisions; leave out --revision.")
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json", "model.safetensors")):
            raise RunFolderError(f"'{place}' has neither a model (config.json) nor an adapter (adapter_config.json).")
        return path
    from lorakit.bases.source import local_folder

    if path.suffix == ".safetensors" and path.is_file():
        return path
    local_folder(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(place, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, beside)
        raise ModelError(f"'{place}' is neither a folder here nor a hub model in the cache.{near}") from None


def base_identity(folder: Path, task: str) -> str:
    """Load a model as the base of a task and return the short id of its identity."""
    from lorakit.adapters.identity import identify
    from lorakit.bases import load_base

    base = load_base(folder, task)
    return identify(base.model, base.new_modules).short


def show_model(model: ModelOutline, folder: Path, identity: str | None) -> None:
    """Print a model's outline."""
    from lorakit.reports import wording

    kind = model.model_type or "unknown type"
    print(f"{folder}: {kind} ({', '.join(model.architectures) or 'no architecture named'})")
    print(f"{wording.count(model.num_params)} parameters, stored as {model.dtype}")
    if identity is not None:
        print(f"identity {identity}")
    if not model.exact:
        output.note("the architecture could not be built here: kinds are guessed from names and shapes")
    table = _table("layers", "kind", "#", "in", "out", "parameters")
    for group in model.groups:
        inside = "" if group.kind == "norm" else f"{group.d_in:,}"
        row = (group.pattern, group.kind, group.count, inside, f"{group.d_out:,}", f"{group.num_parameters:,}")
        table.add_row(*(_plain(cell) for cell in row))
    output.show(table)
    if model.target_names:
        print(f"Targets  {', '.join(model.target_names)}; or the words attention, mlp, all-linear")


def show_adapter(adapter: AdapterOutline) -> None:
    """Print an adapter's outline."""
    from lorakit.reports import wording
    from lorakit.reports.spectrum import effective_rank

    print(f"{adapter.folder}: {wording.method_name(adapter.method)}, {wording.method_settings(adapter.method)}")
    base = adapter.base_name or "not named in the file"
    print(f"Base     {base} ({adapter.identity or 'unverified: the file carries no identity'})")
    print(
        f"Size     {adapter.num_parameters:,} numbers in {adapter.dtype}, {wording.size(adapter.num_bytes)}; "
        f"{wording.plural(len(adapter.layers), 'layer')}"
        + (f", {wording.plural(adapter.num_biases, 'bias vector')}" if adapter.num_biases else "")
    )
    table = _table("layer", "in", "out", "rank", "effective", "numbers")
    for layer in adapter.layers:
        learned = f"{effective_rank(layer.singular_values):.1f}" if layer.singular_values else "-"
        row = (layer.path, f"{layer.d_in:,}", f"{layer.d_out:,}", layer.rank, learned, f"{layer.num_parameters:,}")
        table.add_row(*(_plain(cell) for cell in row))
    for module in adapter.modules:
        table.add_row(_plain(f"{module.path} (in full)"), "", "", "", "", f"{module.num_parameters:,}")
    for rows in adapter.rows:
        table.add_row(_plain(f"{rows.path} (tokens)"), "", "", "", "", f"{rows.num_parameters:,}")
    output.show(table)


def layers_as_json(adapter: AdapterOutline) -> list[dict[str, Any]]:
    """Return the layers with their effective rank."""
    from lorakit.records import to_json
    from lorakit.reports.spectrum import effective_rank

    return [{**to_json(layer), "effective_rank": effective_rank(layer.singular_values)} for layer in adapter.layers]


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    return table


def _plain(cell: object) -> Any:
    from rich.text import Text

    return Text(str(cell))
