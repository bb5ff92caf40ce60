"""``lorakit preview MODEL DATA``: the exact tokens of some rows, and what training will learn of them."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli import options, output

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from lorakit.training.data.pieces import Piece
    from lorakit.training.preview import Preview, ShownRow

SHOWN_PIECES = 400
BAR_WIDTH = 40
# What a space, a line break and a tab are shown as; a break is also made where one is.
VISIBLE = {" ": "·", "\n": "↵\n", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
STYLES = {"supervised": "bold green", "masked": "default", "cut": "dim red strike"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what training will see of some rows.",
        epilog="Example: lorakit preview MODEL rows.jsonl --rows 5",
    )(preview)


def preview(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, or a name on the Hugging Face hub.", show_default=False)
    ],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Rows, as `lorakit train` takes them.", show_default=False)
    ],
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show in their tokens.")] = 3,
    task: Annotated[
        str | None, typer.Option(help="classification, generation or language-modeling; else by the columns.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="FIELD=COLUMN,...", help="Columns of other names: prompt=question,completion=answer."),
    ] = None,
    add_tokens: Annotated[
        str | None, typer.Option(metavar="FILE|A,B,...", help="Tokens to add, as `lorakit train` takes them.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens per row.")] = None,
    validation: Annotated[
        str, typer.Option(metavar="SHARE|FILE", help="Share of the rows to validate on, or a file.")
    ] = "0.1",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    page: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page, too.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show tokens, what is learned of them, lengths, and what is odd about the rows.

    Only the model's tokenizer and config are read. Refused is what training would refuse.
    """
    from lorakit.files import write_text
    from lorakit.records import to_json
    from lorakit.training.data.columns import parse_columns
    from lorakit.training.preview import preview as look

    found = look(
        model,
        data,
        num_shown=rows,
        task=task,
        columns=parse_columns(columns),
        add_tokens=add_tokens,
        max_length=max_length,
        validation=_share_or_file(validation),
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if page is not None:
        write_text(page, as_page(found))
    if as_json:
        output.show_json(to_json(found) | ({"page": page} if page is not None else {}))
        return
    show(found)
    if page is not None:
        print(f"\nPage  {page}")


def show(found: Preview) -> None:
    """Print a preview."""
    from rich.text import Text

    output.show(Text(f"{found.data}\n{found.found}", overflow="fold"))
    for row in found.rows:
        print()
        output.show(Text(_title(found, row), style="bold"), _row_text(row))
    if found.rows:
        print()
        output.show(_legend(found))
    output.show(_facts(found), _histogram(found))
    for text in (*found.warnings, *found.notes):
        output.show(Text.assemble(("! ", "bold yellow"), text, overflow="fold"))


def _share_or_file(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _title(found: Preview, row: ShownRow) -> str:
    learned = f"class {row.target}" if row.target else ""
    left = f"left out: longer than {found.max_length:,} tokens" if row.left_out else ""
    cut = f"{row.num_cut:,} cut" if row.num_cut else ""
    count = sum(len(piece.ids) for piece in row.pieces)
    return ", ".join(part for part in (f"{found.unit} {row.number}: {count:,} tokens", learned, left, cut) if part)


def _row_text(row: ShownRow) -> Text:
    """Write pieces one after the other; a supervised stretch stands in brackets, so that colour is not needed."""
    from rich.text import Text

    text = Text(overflow="fold")
    before = ""
    for piece in row.pieces[:SHOWN_PIECES]:
        text.append(_bracket(before, piece.kind), style="bold cyan")
        _append(text, piece)
        before = piece.kind
    text.append(_bracket(before, ""), style="bold cyan")
    if len(row.pieces) > SHOWN_PIECES:
        text.append(f" … and {len(row.pieces) - SHOWN_PIECES:,} more", style="dim")
    return text


def _bracket(before: str, kind: str) -> str:
    if before == kind:
        return ""
    return ("»" if before == "supervised" else "") + ("«" if kind == "supervised" else "")


def _append(text: Text, piece: Piece) -> None:
    style = STYLES[piece.kind]
    if piece.special:
        text.append(piece.text, style=f"{style} reverse")
        return
    for letter in piece.text:
        faint = letter in VISIBLE or not letter.isprintable()
        text.append(_visible(letter), style=f"{style} dim" if faint else style)


def _visible(letter: str) -> str:
    if letter in VISIBLE:
        return VISIBLE[letter]
    return letter if letter.isprintable() else f"\\u{ord(letter):04x}"


def _legend(found: Preview) -> Text:
    from rich.text import Text

    legend = Text("the class is learned" if found.labels else "«learned»", style="")
    legend.stylize(STYLES["supervised"])
    legend.append("   read only   ")
    if any(row.num_cut or row.left_out for row in found.rows):
        legend.append("cut", style=STYLES["cut"]).append("   ")
    legend.append("special token", style="reverse")
    return legend.append("   · space   ↵ line break")


def _facts(found: Preview) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts(found):
        table.add_row(name, value)
    return table


def facts(found: Preview) -> list[tuple[str, str]]:
    """Return the counts in words."""
    sample = f", counted: {found.num_counted:,}" if found.num_counted < found.num_rows[0] else ""
    lengths = found.lengths
    learned = f"{found.num_supervised:,} learned, {found.num_masked:,} read only, {found.num_cut:,} cut or left out"
    over = f"; {lengths.num_over:,} rows are longer than {found.max_length:,}" if lengths.num_over else ""
    rows = [
        ("Task", found.task + (", with the chat template" if found.chat else "")),
        ("Rows", f"{found.num_rows[0]:,} to train on, {found.num_rows[1]:,} to validate on{sample}"),
        ("Classes and tokens" if found.labels else "Tokens", learned),
        (
            "Tokens in a row",
            f"median {lengths.median:,}, 90 % up to {lengths.p90:,}, longest {lengths.longest:,}{over}",
        ),
        ("max_length", f"{found.max_length:,}; the model's context is {found.context:,}"),
    ]
    if found.labels:
        shown = ", ".join(f"{label} {count:,}" for label, count in list(found.labels.items())[:12])
        more = f" and {len(found.labels) - 12} more" if len(found.labels) > 12 else ""
        rows.append(("Classes", shown + more))
    return rows


def _histogram(found: Preview) -> Text:
    """Draw the lengths as bars; a bin that reaches beyond ``max_length`` is marked."""
    from rich.text import Text

    lengths = found.lengths
    most = max(lengths.counts)
    width = len(f"{lengths.edges[-1]:,}")
    text = Text("Rows by their tokens\n", style="dim")
    for first, last, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        beyond = _beyond(first, last, found.max_length) if count else ""
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        text.append(f"  {first:>{width},} to {last - 1:>{width},}  ", style="dim")
        text.append(bar, style="red" if beyond else "green")
        text.append(f" {count:,}{beyond}\n")
    return text


def _beyond(first: int, last: int, max_length: int) -> str:
    if last - 1 <= max_length:
        return ""
    return " beyond max_length" if first > max_length else " partly beyond max_length"


def as_page(found: Preview) -> str:
    """Return the preview as one HTML page that needs no other file."""
    rows = "".join(
        f"<section><h2>{html.escape(_title(found, row))}</h2><p class=row>{_row_html(row)}</p></section>"
        for row in found.rows
    )
    counts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts(found)
    )
    remarks = "".join(f"<li>{html.escape(text)}</li>" for text in (*found.warnings, *found.notes))
    learned = "the class is learned" if found.labels else "learned"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Preview of {html.escape(found.data)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style><main>'
        f"<h1>{html.escape(found.data)}</h1><p>{html.escape(found.found)}</p>"
        f"<p class=legend><b class=supervised>{learned}</b> <span>read only</span> <span class=cut>cut</span> "
        f"<span class=special>special token</span> <i>·</i> space <i>↵</i> line break</p>{rows}"
        f"<section><h2>Counts</h2><table>{counts}</table></section>"
        f"<section><h2>Rows by their tokens</h2>{_bars(found)}</section>"
        + (f"<section><h2>Remarks</h2><ul>{remarks}</ul></section>" if remarks else "")
        + "</main></html>\n"
    )


def _row_html(row: ShownRow) -> str:
    return "".join(_piece_html(piece) for piece in row.pieces)


def _piece_html(piece: Piece) -> str:
    shown = html.escape(piece.text)
    if not piece.special:
        shown = "".join(
            f"<i>{html.escape(_visible(letter))}</i>"
            if letter in VISIBLE or not letter.isprintable()
            else html.escape(letter)
            for letter in piece.text
        )
    kinds = piece.kind + (" special" if piece.special else "")
    ids = " ".join(str(number) for number in piece.ids)
    return f'<span class="{kinds}" title="{ids}">{shown}</span>'


def _bars(found: Preview) -> str:
    lengths = found.lengths
    most = max(lengths.counts)
    parts = []
    for first, last, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        beyond = _beyond(first, last, found.max_length) if count else ""
        bar = f"<div class='bar{' over' if beyond else ''}' style='width:{300 * count / most:.0f}px'></div>"
        parts.append(f"<tr><th>{first:,} to {last - 1:,}</th><td>{bar} {count:,}{beyond}</td></tr>")
    return f"<table>{''.join(parts)}</table>"


_CSS = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --text: #1c2733; --muted: #5b6875; --line: #e3e8ee;
  --learned: #cdeedd; --learned-text: #0b4f33; --mark: #dfe5ec; --cut: #b0400a; --bar: #00694d; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1419; --card: #171d25; --text: #e6e9ed; --muted: #9aa7b4;
  --line: #2b3541; --learned: #12412d; --learned-text: #b9f3d6; --mark: #2b3541; --cut: #ff9d66; --bar: #4fd1a5; } }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 0 0 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 20px;
  margin: 16px 0; }
.row { font: .92rem/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.row span { border-left: 1px solid var(--line); } i { color: var(--muted); font-style: normal; opacity: .6; }
.supervised { background: var(--learned); color: var(--learned-text); }
.special { outline: 1px solid var(--muted); outline-offset: -2px; border-radius: 4px; font-weight: 600; }
.cut { color: var(--cut); text-decoration: line-through; }
.legend > * { padding: 1px 5px; margin-right: 4px; }
th { text-align: left; font-weight: 500; color: var(--muted); padding-right: 16px; vertical-align: top; }
.bar { display: inline-block; height: .7em; background: var(--bar); } .bar.over { background: var(--cut); }
"""
