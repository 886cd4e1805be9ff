"""What all gating recipes do: observe, calibrate, measure the error, rewrite."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import fx

from sparsify.calibration import Calibration, required_calibration
from sparsify.contracts import PassContext, PassResult
from sparsify.gates import Gate
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.places import Graph, Place, Plan, gate_places, input_places
from sparsify.passes.gating.samples import samples
from sparsify.passes.sites import as_patterns, is_disabled, left_out
from sparsify.passes.sparse_linear import percent
from sparsify.program import Program, ProgramSet
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

At = Literal["inputs", "gates", "closed gates"]
"""Which values are gated: the input of every linear, or the gates of gated networks, behind their
activation or in front of it."""


@dataclass(frozen=True)
class Gating(ABC):
    """A recipe that zeroes features of activations which count little, by a calibrated rule.

    It is lossy, and so never applied unasked. Every place that it finds gets a decision with the
    share of features that tokens keep and the relative error of the linear behind it, both
    measured on the calibration data.

    Attributes:
        sparsity: the share of features that are dropped, above 0 and below 1.
        calibration: data on which the rule is calibrated; texts for a language model.
        sites: shell patterns over the names of linears that may be gated.
        skip: patterns of those that stay; the output layer of a language model does.
        entries: entry programs that are rewritten. By default those of few tokens, ``decode``,
            where a program set has it, else all.
        budget_error: a place with a larger error stays dense; None for no limit.
        fit: a place with a larger error drops as many features as ``budget_error`` allows instead,
            so that places which bear more sparsity than others have more.

    Raises:
        TypeError, ValueError: naming the option and what it may be.
    """

    sparsity: float
    calibration: Calibration
    sites: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("*lm_head",)
    entries: tuple[str, ...] = ()
    budget_error: float | None = None
    fit: bool = False

    name: ClassVar[str]
    tolerance: ClassVar[float] = math.inf
    demands: ClassVar[bool] = True
    """Whether ``strict`` refuses a place that is left as it is."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise TypeError(f"{kind}: sparsity must be a number, not {self.sparsity!r}")
        if not 0 < self.sparsity < 1:
            raise ValueError(f"{kind}: sparsity={self.sparsity} must lie between 0 and 1")
        required_calibration(kind, self.calibration)
        if self.budget_error is not None and not self.budget_error > 0:
            raise ValueError(f"{kind}: budget_error={self.budget_error} must be above 0, or None")
        if self.fit and self.budget_error is None:
            raise ValueError(f"{kind}: fit=True needs a budget_error to fit to")
        if self.gated() not in get_args(At):
            known = ", ".join(map(repr, get_args(At)))
            raise ValueError(f"{kind}: at={self.gated()!r} must be one of {known}")
        for option in ("sites", "skip", "entries"):
            object.__setattr__(self, option, as_patterns(getattr(self, option)))

    @abstractmethod
    def rule(self) -> type[Gate]:
        """The gate that is calibrated."""

    def gated(self) -> At:
        """Which values are gated."""
        return "inputs"

    def importance(self, observed: Observed) -> torch.Tensor:
        """What the magnitude of each feature counts, ``[features]``: all alike by default."""
        return torch.ones(observed.values.shape[-1])

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        """See `sparsify.contracts.Pass.run`.

        Raises:
            ValueError: an entry program is unknown, or nothing in them can be gated; with
                ``strict``, a place exceeds ``budget_error``.
        """
        entries = self._entries(programs)
        decisions: list[Decision] = []
        done: list[Program] = []
        shared = dict(programs.weights)
        plans: dict[str, dict[str, Plan]] = {}
        for program in programs:
            if program.name not in entries:
                done.append(program)
                continue
            source = programs["prefill"] if "prefill" in programs.names else program
            if source.name not in plans:
                plans[source.name] = self._plans(source)
            rewriter = Rewriter(program, shared)
            found = list(self._rewrite(rewriter, plans[source.name], context))
            if not found:
                raise ValueError(
                    f"{self.name}: program {program.name!r} has nothing that it can gate: "
                    f"{_LOOKED_FOR[self.gated()]} among the sites {list(self.sites)} without "
                    f"{list(self.skip)}"
                )
            decisions.extend(found)
            done.append(rewriter.finish())
        return PassResult(ProgramSet(tuple(done)), tuple(decisions))

    def _entries(self, programs: ProgramSet) -> tuple[str, ...]:
        unknown = [name for name in self.entries if name not in programs.names]
        if unknown:
            raise ValueError(
                f"{self.name}: entries={list(self.entries)}: there is no program {unknown[0]!r}; "
                f"there are {list(programs.names)}"
            )
        default = ("decode",) if "decode" in programs.names else programs.names
        return self.entries or default

    def _places(self, graph: Graph, nodes: list[fx.Node]) -> Iterator[Place]:
        for place in self.find(graph, nodes):
            if left_out(place.site.name, self.sites, self.skip) is None:
                yield place

    def find(self, graph: Graph, nodes: list[fx.Node]) -> Iterable[Place]:
        """Where this recipe may act, whatever ``sites`` and ``skip`` say."""
        if self.gated() == "inputs":
            return input_places(graph, nodes)
        return gate_places(graph, nodes, activated=self.gated() == "gates")

    def _plans(self, program: Program) -> dict[str, Plan]:
        """A plan for each place, by the name of its weight."""
        places = list(self._places(program, list(program.graph.nodes)))
        seen = samples(program, self.calibration, {place.x for place in places})
        with torch.no_grad():
            return {p.site.weight: self._fitted(p.observe(program, seen[p.x])) for p in places}

    def _fitted(self, observed: Observed) -> Plan:
        """The plan of the wanted sparsity, or with ``fit`` of the largest that keeps the error."""
        plan = self.plan(observed, self.sparsity)
        if not self.fit or self.refusal(plan) is None:
            return plan
        low, high = 1, _FITS
        while low < high:
            middle = (low + high) // 2
            plan = self.plan(observed, self.sparsity * (1 - middle / (_FITS + 1)))
            low, high = (low, middle) if self.refusal(plan) is None else (middle + 1, high)
        return self.plan(observed, self.sparsity * (1 - low / (_FITS + 1)))

    def plan(self, observed: Observed, sparsity: float) -> Plan:
        """The rule calibrated to a sparsity, and what it does to the samples it saw."""
        calibrated = self.rule().calibrate(observed.values, sparsity, self.importance(observed))
        keep = calibrated.keep(observed.values)
        return Plan(calibrated, float(keep.float().mean()), observed.error(keep))

    def refusal(self, plan: Plan) -> str | None:
        """Why a place is better left dense."""
        if self.budget_error is None or plan.error <= self.budget_error:
            return None
        return f"its error {plan.error:.1%} is above budget_error={self.budget_error}"

    def account(self, plan: Plan) -> str:
        """What was done at a place, in a sentence."""
        assert plan.calibrated is not None
        rule, values = plan.calibrated.gate.spec, _GATED[self.gated()]
        kept = f"{rule}: a token keeps {percent(plan.active)} of {values}"
        return f"{kept}; relative error {plan.error:.1%}"

    def _rewrite(
        self, rewriter: Rewriter, plans: dict[str, Plan], context: PassContext
    ) -> Iterator[Decision]:
        for place in list(self._places(rewriter, rewriter.nodes)):
            plan, site = plans.get(place.site.weight), place.site
            if is_disabled(site.name, context.disabled_sites):
                yield self._decision(place, "skipped", "switched off by the caller", None)
            elif plan is None:
                reason = "the program that is calibrated has no such site"
                yield self._decision(place, "skipped", reason, None)
            elif (refusal := self.refusal(plan)) is not None:
                if context.strict and self.demands:
                    raise ValueError(
                        f"strict=True: {site.name} of shape {site.shape} is not gated: {refusal}; "
                        "leave it out by skip, or compile with strict=False"
                    )
                yield self._decision(place, "skipped", f"stays dense: {refusal}", plan)
            else:
                place.apply(rewriter, plan)
                yield self._decision(place, "rewritten", self.account(plan), plan)

    def _decision(
        self, place: Place, verdict: Literal["rewritten", "skipped"], reason: str, plan: Plan | None
    ) -> Decision:
        return Decision(
            place.site.name,
            "gate",
            verdict,
            reason,
            self.name,
            shape=place.site.shape,
            density=None if plan is None else plan.active,
            error=None if plan is None else plan.error,
        )


_FITS = 31
"""Sparsities that ``fit`` tries, evenly from the wanted one down."""

_NETWORKS = "gated networks (a gate and an up projection, multiplied, read by one linear)"
_LOOKED_FOR = {"inputs": "linears", "gates": _NETWORKS, "closed gates": _NETWORKS}
_GATED = {
    "inputs": "its inputs",
    "gates": "its activated gates",
    "closed gates": "its gates in front of the activation",
}
