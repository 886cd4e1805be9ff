"""Measures the structure of every linear's weight."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ops
from sparsify.layouts import WeightStats, parse
from sparsify.passes.graph import arguments, aten
from sparsify.passes.sites import linear_site, site_name
from sparsify.program import PassContext, PassResult, Program, ProgramSet

_LINEAR = ops.sparse_linear.overload


@dataclass(frozen=True)
class AnalyzeWeights:
    """Changes nothing; fills ``PassResult.analysis`` with `WeightStats` by site.

    Before and after::

        linear(x, W, bias) | sparse_linear(x, [...], layout, ...)

    Sites carry the same names as in the decisions of the other passes. A weight that serves
    several linears is measured once.
    """

    name = "analyze_weights"
    tolerance = 0.0

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        analysis: dict[str, WeightStats] = {}
        for program in programs:
            _measure(program, analysis)
        return PassResult(programs, analysis=analysis)


def _measure(program: Program, analysis: dict[str, WeightStats]) -> None:
    for node in program.graph.nodes:
        if node.target == _LINEAR:
            site = linear_site(program, node)
            if site.name not in analysis:
                options = arguments(node)
                layout = parse(options["layout"])
                tensors = [program.weight_of(n).detach() for n in options["weight"]]
                packed = dict(zip(layout.tensors, tensors, strict=True))
                analysis[site.name] = WeightStats.of(layout.unpack(packed, site.shape))
        elif node.target == aten.linear.default:
            name = program.weight_names.get(node.args[1].name)
            weight = program.weight_of(node.args[1])
            if name is not None and weight.dim() == 2 and site_name(name) not in analysis:
                analysis[site_name(name)] = WeightStats.of(weight)
