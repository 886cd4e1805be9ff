"""Exact zeros: what ReLU and its kin leave is skipped, without loss.

Sources: Mirzadeh et al., "ReLU Strikes Back: Exploiting Activation Sparsity in Large Language
Models", ICLR 2024; Zhang et al., "ReLU^2 Wins: Discovering Efficient Activation Functions for
Sparse LLMs", 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparsify.gates import Gate, Threshold
from sparsify.passes.gating.observed import Observed
from sparsify.passes.gating.places import Graph, Place, Plan, gate_places, input_places
from sparsify.passes.gating.recipe import Gating
from sparsify.passes.sparse_linear import percent


@dataclass(frozen=True)
class ExactZeros(Gating):
    """Linears skip inputs that are zero already, whatever made them: ReLU, ReLU^2, ReLU6.

    A network gated by ReLU (ReGLU) computes the rows of its up projection whose gate is not zero::

        h = relu(x @ Wg.T);  y = (h * (x @ Wu.T)) @ Wd.T

    Nothing is lost. How many zeros there are depends on data, and so this is calibrated too.

    Attributes:
        sparsity: the least share of zeros on the calibration data that is made use of. The other
            attributes are those of `Gating`.
    """

    name = "exact_zeros"
    demands = False

    def rule(self) -> type[Gate]:
        return Threshold

    def find(self, graph: Graph, nodes: list[fx.Node]) -> Iterable[Place]:
        gates = [p for p in gate_places(graph, nodes) if p.activation == "relu"]
        taken = {linear for place in gates for linear in (place.linear, place.down)}
        return [*gates, *(p for p in input_places(graph, nodes) if p.linear not in taken)]

    def plan(self, observed: Observed, sparsity: float) -> Plan:
        return Plan(None, float((observed.values != 0).float().mean()), 0.0)

    def refusal(self, plan: Plan) -> str | None:
        zeros = 1 - plan.active
        if zeros >= self.sparsity:
            return None
        return f"{percent(zeros)} of what it reads is zero, less than sparsity={self.sparsity}"

    def account(self, plan: Plan) -> str:
        return f"{percent(1 - plan.active)} of what it reads is exactly zero and skipped"
