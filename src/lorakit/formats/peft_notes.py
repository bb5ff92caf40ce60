"""What PEFT's spelling does not say of a layer, as strings in the metadata of the tensors.

lorakit.layers      by site: kind, native shape, rank, rows of a part, options; whether the form is our own
lorakit.transposed  layers that store ``[d_in, d_out]``, where the config cannot say it of all
lorakit.biases      paths of trained biases by the base's name of the parameter, where they are not ``path.bias``
lorakit.targets     the targets' names, where the config has to name other things
lorakit.rows        by path: kind, native shape and rows of tokens that are trained whole
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import FormatError
from lorakit.layers.ops import Runs


@dataclass(frozen=True)
class Note:
    """What the tensors of one site are.

    Attributes:
        kind: the layer's kind.
        shape: the base weight's native shape.
        rank: the site's own rank; in the file it may stand beside others.
        runs: its rows, where it is a part of a fused projection.
        options: see ``SiteState``.
        own: the tensors stand as they are under the site's own path, a form that PEFT does not have.
    """

    kind: str
    shape: tuple[int, ...]
    rank: int
    runs: Runs | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    own: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, without what says nothing."""
        fields = {"kind": self.kind, "shape": self.shape, "rank": self.rank, "runs": self.runs}
        fields.update(options=dict(self.options), own=self.own)
        return {name: value for name, value in fields.items() if value not in (None, {}, False)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Note:
        """Read what :meth:`to_json` returned."""
        runs = fields.get("runs")
        return cls(
            kind=str(fields["kind"]),
            shape=tuple(int(size) for size in fields["shape"]),
            rank=int(fields["rank"]),
            runs=None if runs is None else tuple((int(start), int(stop)) for start, stop in runs),
            options={k: tuple(v) if isinstance(v, list) else v for k, v in fields.get("options", {}).items()},
            own=bool(fields.get("own", False)),
        )


@dataclass(frozen=True)
class Notes:
    """All notes of a file.

    Attributes:
        layers: by site, those of one module in the order of its parameters.
        transposed: see the module; None where the file does not say.
        biases, targets: see the module.
        rows: of rows of tokens trained whole, by path.
    """

    layers: Mapping[str, Note] = field(default_factory=dict)
    transposed: frozenset[str] | None = None
    biases: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    rows: Mapping[str, Note] = field(default_factory=dict)

    @functools.cached_property
    def by_weight(self) -> Mapping[str, Mapping[str, Note]]:
        """The notes of sites in PEFT's form, by the weight that they are, or are parts of."""
        found: dict[str, dict[str, Note]] = {}
        for site, note in self.layers.items():
            if not note.own:
                found.setdefault(weight_path(site, note.runs), {})[site] = note
        return found

    def to_metadata(self) -> dict[str, str]:
        """Return the strings of those that say something."""
        values: dict[str, Any] = {
            "lorakit.layers": {path: note.to_json() for path, note in self.layers.items()},
            "lorakit.transposed": sorted(self.transposed or ()),
            "lorakit.biases": dict(sorted(self.biases.items())),
            "lorakit.targets": self.targets,
            "lorakit.rows": {path: note.to_json() for path, note in self.rows.items()},
        }
        return {key: json.dumps(value) for key, value in values.items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Notes:
        """Read them from a file's metadata.

        Raises:
            FormatError: they are not what :meth:`to_metadata` writes.
        """
        try:
            values = {key: json.loads(text) for key, text in metadata.items() if key in _KEYS}
            transposed = values.get("lorakit.transposed")
            return cls(
                layers={path: Note.from_json(fields) for path, fields in values.get("lorakit.layers", {}).items()},
                transposed=None if transposed is None else frozenset(transposed),
                biases={str(name): str(path) for name, path in values.get("lorakit.biases", {}).items()},
                targets=tuple(str(name) for name in values.get("lorakit.targets", ())),
                rows={path: Note.from_json(fields) for path, fields in values.get("lorakit.rows", {}).items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the metadata of the tensors is damaged ({error!r}). Save the adapter again.") from error


def weight_path(site: str, runs: Runs | None) -> str:
    """Return the path of the weight that a site is, or is a part of."""
    return site if runs is None else site.rpartition("[")[0]


_KEYS = frozenset({"lorakit.layers", "lorakit.transposed", "lorakit.biases", "lorakit.targets", "lorakit.rows"})
