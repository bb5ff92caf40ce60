"""The tables of ``docs/models.md``, read from the models of the zoo: ``python -m tests.zoo.page`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from lorakit.adapters.targets import Places, find_sites, head_paths
from lorakit.adapters.words import WORDS
from lorakit.errors import TargetError, UnsupportedLayerError
from lorakit.layers import Site
from lorakit.layers.site import parts_at

from .models import ZOO, build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
RENEW = "python -m tests.zoo.page"

# Said by hand, where a table cannot.
NOTES = {
    "bert": "`pooler.dense` is in no block",
    "clip": "as two encoders; with a classifier, that is a head",
    "gemma": "embeddings are scaled",
    "gemma3": "embeddings are scaled",
    "lstm": "no class says which layer is a head; PEFT adapts no recurrent layer",
    "mamba": "its mixer reads `dt_proj` and `conv1d` itself: an adapter there does nothing, and `verify` says so; "
    "PEFT refuses `out_proj`",
    "own_resnet": "no class says which layer is a head; convolutions by name",
    "qwen2_moe": "`shared_expert_gate` and the router `mlp.gate.weight` by name",
    "mixtral": "the router by name: `mlp.gate.weight`",
    "resnet": "convolutions by name: `convolution`",
    "wav2vec2": "convolutions by name; that of positions computes its weight and cannot be merged into",
}


def tables() -> dict[str, str]:
    """Return the page's tables by the names of their places."""
    words, rest = [], []
    for name, specimen in ZOO.items():
        model = build(name)
        found = {word: of_word(model, word) for word in WORDS}
        said = {site.path for word in ("attention", "mlp") for site in found[word]}
        other = [site for site in found["all-linear"] if site.path not in said]
        groups = [found["attention"], found["mlp"], other]
        words.append([specimen.family, *(code(ends(model, group)) for group in groups)])
        rest.append(
            [
                specimen.family,
                code(head_paths(model)),
                code(fused(model, found["all-linear"])),
                "no" if specimen.peft_refuses else "yes",
                NOTES.get(name, ""),
            ]
        )
    return {
        "words": table(["model", "`attention`", "`mlp`", "further in `all-linear`"], words),
        "rest": table(["model", "heads", "fused, with their parts", "PEFT loads it", "note"], rest),
    }


def of_word(model: nn.Module, word: str) -> list[Site]:
    """Return what a word means in a model, nothing where it is refused."""
    try:
        return find_sites(model, word)
    except TargetError:
        return []


def ends(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return the ends of the paths of ``sites``, as short as tells them from other layers within a block."""
    own = {site.path: site.host for site in sites}
    others = [path for path in Places.of(model).sites if path not in own]
    return list(dict.fromkeys(_end(path, host, others) for path, host in own.items()))


def _end(path: str, host: str, others: list[str]) -> str:
    parts = path.split(".")
    # One of several weights of a layer is shown with the layer's name.
    for count in range(1 if path == host else 2, len(parts)):
        end = ".".join(parts[-count:])
        if parts[-count - 1].isdigit() or not any(other.endswith(f".{end}") or other == end for other in others):
            return end
    return path


def fused(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return the projections that hold several parts, as targets for one of them are written."""
    found: dict[str, None] = {}
    for site in sites:
        try:
            parts = parts_at(model, site)
        except UnsupportedLayerError:
            continue
        if parts:
            found[f"{site.path.rpartition('.')[2]}[{','.join(parts)}]"] = None
    return list(found)


def code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names) or "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def renewed(page: str) -> str:
    """Return a page with every table between its two marks made again."""
    for name, text in tables().items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)",
            lambda m, t=text: m[1] + t + m[2],
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(
                f"{PAGE.name} needs one place '<!-- {name} -->' to '<!-- end of {name} -->', it has {count}."
            )
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
