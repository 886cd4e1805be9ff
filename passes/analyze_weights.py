"""Measures the structure of every linear's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsify import ops
from sparsify.contracts import PassContext, PassResult
from sparsify.layouts import WeightStats
from sparsify.passes.graph import arguments, aten
from sparsify.passes.sites import linear_site, site_name, stored_weight
from sparsify.program import Program, ProgramSet


@dataclass(frozen=True)
class AnalyzeWeights:
    """Changes nothing; fills ``PassResult.analysis`` with `WeightStats` by site.

    Before and after::

        linear(x, W, bias) | sparse_linear(x, [...], layout, ...)

    Sites carry the same names as in the decisions of the other passes. A weight that serves
    several linears is measured once.
    """

    name: ClassVar[str] = "analyze_weights"

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        analysis: dict[str, WeightStats] = {}
        for program in programs:
            _measure(program, analysis)
        return PassResult(programs, analysis=analysis)


def _measure(program: Program, analysis: dict[str, WeightStats]) -> None:
    for node in program.graph.nodes:
        if node.target in ops.LINEARS:
            site = linear_site(program, node)
            if site.name not in analysis:
                analysis[site.name] = WeightStats.of(stored_weight(program, node))
        elif node.target == aten.linear.default:
            operand = arguments(node)["weight"]
            name = program.weight_names.get(operand.name)
            weight = program.weight_of(operand)
            if name is None or weight is None or weight.dim() != 2:
                continue
            if site_name(name) not in analysis:
                analysis[site_name(name)] = WeightStats.of(weight)
