"""How active a program's features are: what gating could skip, before any recipe is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table

from sparsify.calibration import Calibration
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.places import Place, gate_places, input_places
from sparsify.passes.gating.samples import samples
from sparsify.passes.sites import is_disabled
from sparsify.program import Program

ERRORS = (0.01, 0.05, 0.1)
"""Relative errors of a linear's result at which negligible features are counted."""

CHUNKS = (1, 2, 4, 8, 16)
"""Tokens that are computed together."""

_TYPICAL = 0.05
"""The error of `ERRORS` for which spread and unions are told."""

_TOKENS = 256
_STEPS = 100


@dataclass(frozen=True)
class SiteActivity:
    """The activity of features at one place, over the tokens of the calibration data.

    Shares are of all features. *Negligible* at an error are the features of smallest magnitude
    that can be zero, by one threshold for all tokens, before the result of the linear that reads
    them changes by more than that, relative to its norm.

    Attributes:
        site: of the linear that reads the features or makes the gates.
        values: ``inputs`` of a linear, or activated ``gates`` of a gated network.
        shape: of the site's weight.
        zeros: share that is exactly zero.
        negligible: share by error.
        spread: the 10th, 50th and 90th percentile over tokens of the share that is negligible at
            5% error.
        union: share of features that any of so many consecutive tokens has not negligible, at
            5% error, by the number of tokens; and not zero.
        union_nonzero: likewise, of features that are not exactly zero.
        tokens: of the data that was looked at.
    """

    site: str
    values: Literal["inputs", "gates"]
    shape: tuple[int, int]
    zeros: float
    negligible: dict[float, float]
    spread: tuple[float, float, float]
    union: dict[int, float]
    union_nonzero: dict[int, float]
    tokens: int


@dataclass(frozen=True)
class ActivationAnalysis:
    """The activity at every place of a program, in its order."""

    program: str
    sites: tuple[SiteActivity, ...]

    def __iter__(self) -> Iterator[SiteActivity]:
        return iter(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, keys that are numbers as text."""
        return {
            "program": self.program,
            "sites": [
                {
                    name: {str(key): share for key, share in value.items()}
                    if isinstance(value, dict)
                    else list(value)
                    if isinstance(value, tuple)
                    else value
                    for name, value in asdict(site).items()
                }
                for site in self.sites
            ],
        }

    def table(self) -> Table:
        tokens = max((site.tokens for site in self), default=0)
        table = Table(
            title=f"activations of {self.program}, {tokens} tokens",
            caption="at E%: share that can be zero at that relative error of the linear; spread: "
            "10th to 90th percentile over tokens; of N: share that any of N tokens in a row needs, "
            f"at {_TYPICAL:.0%} error",
        )
        table.add_column("site", overflow="fold")
        for name in ("values", "shape"):
            table.add_column(name)
        names = ["zeros", *(f"at {error:.0%}" for error in ERRORS), "spread"]
        for name in (*names, *(f"of {count}" for count in CHUNKS)):
            table.add_column(name, justify="right")
        for site in self:
            table.add_row(
                site.site,
                site.values,
                "x".join(map(str, site.shape)),
                f"{site.zeros:.0%}",
                *(f"{site.negligible[error]:.0%}" for error in ERRORS),
                f"{site.spread[0]:.0%}-{site.spread[2]:.0%}",
                *(f"{site.union[c]:.0%}" if c in site.union else "" for c in CHUNKS),
            )
        return table

    def __rich__(self) -> Table:
        return self.table()


def analyze(
    program: Program, calibration: Calibration, sites: Iterable[str] = ("*",)
) -> ActivationAnalysis:
    """The activity at the inputs of all linears and the gates of all gated networks.

    Args:
        program: portable; the entry ``prefill`` of a language model.
        sites: shell patterns over names of linears.

    Raises:
        ValueError: there is no such place.
    """
    nodes = list(program.graph.nodes)
    places: list[Place] = [*input_places(program, nodes), *gate_places(program, nodes)]
    places = [place for place in places if is_disabled(place.site.name, sites)]
    if not places:
        raise ValueError(
            f"program {program.name!r} has no linear among the sites {list(sites)} to analyse"
        )
    seen = samples(program, calibration, {p.x for p in places}, _TOKENS, run=max(CHUNKS))
    with torch.no_grad():
        found = tuple(_activity(p, p.observe(program, seen[p.x])) for p in places)
    order = {place.site.name: number for number, place in enumerate(places)}
    return ActivationAnalysis(
        program.name, tuple(sorted(found, key=lambda s: (order[s.site], s.values == "gates")))
    )


def _activity(place: Place, observed: Observed) -> SiteActivity:
    magnitude = observed.values.abs()
    nonzero = magnitude > 0
    shares = _Negligible(observed, magnitude)
    negligible = {error: shares.at(error) for error in ERRORS}
    active = magnitude > shares.threshold(negligible[_TYPICAL])
    inactive = 1 - active.float().mean(-1)
    low, middle, high = inactive.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return SiteActivity(
        place.site.name,
        place.values,
        place.site.shape,
        1 - float(nonzero.float().mean()),
        negligible,
        (low, middle, high),
        _unions(active),
        _unions(nonzero),
        len(magnitude),
    )


class _Negligible:
    """How much can be zero: a search over whole percents, since the error grows with the share."""

    def __init__(self, observed: Observed, magnitude: torch.Tensor) -> None:
        self.observed, self.magnitude = observed, magnitude
        self.ordered = magnitude.flatten().sort().values
        self.errors: dict[int, float] = {}

    def threshold(self, share: float) -> float:
        """Magnitudes up to it are that share of all; below 0 for none."""
        count = round(share * len(self.ordered))
        return float(self.ordered[count - 1]) if count else -1.0

    def at(self, error: float) -> float:
        """The largest share, to a percent, that keeps the error; zeros at least."""
        low, high = 0, _STEPS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._error(middle) <= error else (low, middle - 1)
        return low / _STEPS

    def _error(self, step: int) -> float:
        if step not in self.errors:
            keep = self.magnitude > self.threshold(step / _STEPS)
            self.errors[step] = self.observed.error(keep)
        return self.errors[step]


def _unions(active: torch.Tensor) -> dict[int, float]:
    """The share of features that are active for any of some rows in a row."""
    return {
        count: float(
            active[: len(active) // count * count].unflatten(0, (-1, count)).any(1).float().mean()
        )
        for count in CHUNKS
        if count <= len(active)
    }
