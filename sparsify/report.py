"""Decisions and the report: what was done at each site of a model, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


class Notice(UserWarning):
    """A warning of ours: something went another way than asked, which is no error."""


Verdict = Literal["sparse", "dense", "rewritten", "skipped", "unsupported"]
"""sparse: runs on a sparse layout. dense: runs dense, the reason says why. rewritten: the graph
changed shape here (fused, merged, folded). skipped: a pattern nearly matched, the reason says
what was missing. unsupported: left to PyTorch as a fallback region."""


@dataclass(frozen=True)
class Decision:
    """One verdict about one site.

    Attributes:
        site: qualified name of the site, ``encoder.layer.0.output.dense``.
        operator: what stands there: ``linear``, ``attention``, ``layer_norm`` ...
        verdict: see `Verdict`.
        reason: one sentence; never empty.
        made_by: name of the pass that decided.
        shape: operand shape, (out_features, in_features) for a linear.
        density: nonzeros over elements, None where it has no meaning.
        layout: layout spec bound to the site, None while the program is portable.
        bytes_stored: bytes of the weight as bound; bytes_dense: of the dense fp32 original.
        predicted_seconds: the cost model's time of the chosen layout, summed over the weight's
            uses; dense_seconds: of the best dense one. Measured times where it measured.
        measured_seconds: as tuned; None when any of it was predicted.
        error: measured error of a lossy rewrite; None for lossless ones.
        mass: share of attention's weights that a lossy rewrite keeps, measured likewise.
    """

    site: str
    operator: str
    verdict: Verdict
    reason: str
    made_by: str
    shape: tuple[int, ...] = ()
    density: float | None = None
    layout: str | None = None
    bytes_stored: int | None = None
    bytes_dense: int | None = None
    predicted_seconds: float | None = None
    dense_seconds: float | None = None
    measured_seconds: float | None = None
    error: float | None = None
    mass: float | None = None

    def __post_init__(self) -> None:
        if not self.reason:
            raise ValueError(f"decision about {self.site!r} by {self.made_by!r} gives no reason")

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Decision:
        return cls(**{**record, "shape": tuple(record["shape"])})


@dataclass(frozen=True)
class Report:
    """All decisions of one compilation, in the order the passes made them."""

    decisions: tuple[Decision, ...] = ()
    target: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was measured about the whole: compile seconds, bytes, token count of the prediction."""

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def extended(self, decisions: Iterable[Decision]) -> Report:
        return dataclasses.replace(self, decisions=(*self.decisions, *decisions))

    def about(self, site: str) -> tuple[Decision, ...]:
        """Every decision about one site, for ``sparsify explain``."""
        return tuple(d for d in self.decisions if d.site == site)

    def final(self) -> tuple[Decision, ...]:
        """The last verdict on a storage layout for each site, and every fallback."""
        last: dict[str, Decision] = {}
        for d in self.decisions:
            if d.verdict in ("sparse", "dense", "unsupported"):
                last.pop(d.site, None)
                last[d.site] = d
        return tuple(last.values())

    @property
    def fallbacks(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.verdict == "unsupported")

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "facts": dict(self.facts),
            "decisions": [d.to_dict() for d in self.decisions],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Report:
        decisions = tuple(Decision.from_dict(d) for d in record["decisions"])
        return cls(decisions, record["target"], dict(record["facts"]))

    def table(self) -> Table:
        """The final verdicts as a rich table, one row a site."""
        table = Table(title=f"sparsify report: {self.target}" if self.target else "sparsify report")
        for name in ("site", "operator", "shape"):
            table.add_column(name)
        for name in ("nonzero", "bytes", "of dense", "predicted", "x dense"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        table.add_column("reason", overflow="fold")
        for d in self.final():
            verdict = f"{d.verdict} {d.layout}" if d.layout else d.verdict
            table.add_row(
                d.site,
                d.operator,
                "x".join(map(str, d.shape)),
                "" if d.density is None else f"{d.density:.1%}",
                "" if d.bytes_stored is None else _bytes(d.bytes_stored),
                _ratio(d.bytes_stored, d.bytes_dense, "{:.2f}"),
                "" if d.predicted_seconds is None else f"{d.predicted_seconds * 1e6:.0f} us",
                _ratio(d.dense_seconds, d.predicted_seconds, "{:.1f}x"),
                verdict,
                d.reason,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _ratio(top: float | None, bottom: float | None, form: str) -> str:
    return form.format(top / bottom) if top is not None and bottom else ""


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"
