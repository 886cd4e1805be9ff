"""Where features can be gated: the inputs of a linear, and the gates of a gated network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from sparsify import ops
from sparsify.gates import Calibrated
from sparsify.layouts import parse
from sparsify.ops import ACTIVATIONS
from sparsify.passes.elementwise import activate
from sparsify.passes.gating.emit import active_linear, dense_linear, gate, gated_linear
from sparsify.passes.gating.observed import Observed
from sparsify.passes.graph import arguments, aten, erase_dead, past_copies, sole_user
from sparsify.passes.sites import linear_site, member_names, named_weight, pack, stored_weight
from sparsify.program import Program, Site
from sparsify.rewriter import Rewriter

Graph = Program | Rewriter


@dataclass(frozen=True)
class Plan:
    """How a place is to be gated.

    Attributes:
        calibrated: the rule; None where the zeros are there already.
        active: share of the features that a token keeps.
        error: of the result of the linear behind it, relative.
        low_rank: ``(inner [rank, features], outer [out_features, rank])`` whose product stands in
            for the weight where features are dropped.
    """

    calibrated: Calibrated | None
    active: float
    error: float
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Place(ABC):
    """One linear, ``site``, and where its features come from."""

    linear: fx.Node
    site: Site

    values: ClassVar[Literal["inputs", "gates"]]
    """What is gated."""

    @property
    def x(self) -> fx.Node:
        """The value of which calibration must bring samples."""
        found: fx.Node = arguments(self.linear)["x"]
        return found

    @abstractmethod
    def observe(self, program: Program, x: torch.Tensor) -> Observed:
        """What samples of `x` show."""

    @abstractmethod
    def apply(self, rewriter: Rewriter, plan: Plan) -> None:
        """Rewrites the graph in which the place is."""


@dataclass(frozen=True)
class InputPlace(Place):
    """The input of a linear.

    Before::

        x -> sparse_linear(W)

    After::

        x -> gate -> active_linear(W)

    or, with a low-rank stand-in for the rest::

        x - gate(x) -> sparse_linear(inner) -> sparse_linear(outer) -> r
        gate(x) -> active_linear(W, residual=r)
    """

    values = "inputs"

    def observe(self, program: Program, x: torch.Tensor) -> Observed:
        return Observed(x, x, stored_weight(program, self.linear))

    def apply(self, rewriter: Rewriter, plan: Plan) -> None:
        with rewriter.graph.inserting_before(self.linear):
            kept = gate(rewriter, self.x, plan.calibrated, self.site.weight)
            if plan.low_rank is None:
                y = active_linear(rewriter, self.linear, plan.active, x=kept)
            else:
                y = self._with_low_rank(rewriter, kept, plan.active, *plan.low_rank)
        rewriter.replace(self.linear, y)

    def _with_low_rank(
        self,
        rewriter: Rewriter,
        kept: fx.Node,
        active: float,
        inner: torch.Tensor,
        outer: torch.Tensor,
    ) -> fx.Node:
        """An activation of the linear, and what is added behind it, run on their own."""
        options, name = arguments(self.linear), self.site.weight
        activation, residual = options["activation"], options["residual"]
        added = residual if activation == "none" else None
        rest = rewriter.call(aten.sub.Tensor, (self.x, kept))
        rest = dense_linear(rewriter, rest, f"{name}:low_rank.inner", inner)
        rest = dense_linear(rewriter, rest, f"{name}:low_rank.outer", outer, added)
        changed = {"x": kept, "activation": "none", "residual": rest}
        y = active_linear(rewriter, self.linear, active, **changed)
        if activation == "none":
            return y
        y = activate(rewriter, y, activation)
        return y if residual is None else rewriter.call(aten.add.Tensor, (y, residual))


@dataclass(frozen=True)
class GatePlace(Place):
    """The gate of a gated feed-forward network, before or after its activation.

    Before::

        x -> sparse_linear(cat(Wg, Wu)) -> gated(., "silu") -> sparse_linear(Wd)

    After, the rows of the merged weight apart, as views of it where they are dense::

        x -> sparse_linear(Wg, activation="silu") -> gate -> h
        gated_linear(x, h, Wu) -> active_linear(Wd)

    Every activation gives 0 for 0, so that a gate in front of it does the same.

    Attributes:
        linear: gate and up projections, one linear.
        gated, down: what follows it.
        activated: whether the gate sees values behind the activation.
    """

    gated: fx.Node
    down: fx.Node
    activated: bool = True

    values = "gates"

    @property
    def activation(self) -> str:
        name: str = arguments(self.gated)["activation"]
        return name

    def observe(self, program: Program, x: torch.Tensor) -> Observed:
        bias = program.weight_of(arguments(self.linear)["bias"])
        both = torch.nn.functional.linear(x, stored_weight(program, self.linear), bias)
        closed, up = both.detach().chunk(2, dim=-1)
        opened = ACTIVATIONS[self.activation](closed)
        weight = stored_weight(program, self.down)
        return Observed(opened if self.activated else closed, opened * up, weight)

    def apply(self, rewriter: Rewriter, plan: Plan) -> None:
        halves = _halves(rewriter, self.linear, self.site)
        activation = self.activation if self.activated else "none"
        with rewriter.graph.inserting_before(self.gated):
            options = {**arguments(self.linear), **halves[0], "activation": activation}
            values = rewriter.call(ops.sparse_linear.overload, tuple(options.values()))
            kept = gate(rewriter, values, plan.calibrated, self.site.weight)
            if not self.activated:
                kept = activate(rewriter, kept, self.activation)
            z = gated_linear(rewriter, self.linear, kept, plan.active, **halves[1])
        rewriter.replace(self.gated, z)
        with rewriter.graph.inserting_before(self.down):
            y = active_linear(rewriter, self.down, plan.active)
        rewriter.replace(self.down, y)
        for node in (self.down, self.gated):
            erase_dead(rewriter, node)


def input_places(graph: Graph, nodes: list[fx.Node]) -> Iterator[InputPlace]:
    """Every linear."""
    for node in nodes:
        if node.target == ops.sparse_linear.overload:
            yield InputPlace(node, linear_site(graph, node))


def gate_places(graph: Graph, nodes: list[fx.Node], activated: bool = True) -> Iterator[GatePlace]:
    """Every gated network whose result one linear reads, and nothing else."""
    for node in nodes:
        if node.target != ops.gated.overload:
            continue
        linear, down = past_copies(arguments(node)["x"]), sole_user(node)
        if linear.target != ops.sparse_linear.overload or len(linear.users) != 1:
            continue
        options = arguments(linear)
        if options["activation"] != "none" or options["residual"] is not None or down is None:
            continue
        if down.target == ops.sparse_linear.overload and past_copies(arguments(down)["x"]) is node:
            yield GatePlace(linear, linear_site(graph, linear), node, down, activated)


def _halves(rewriter: Rewriter, linear: fx.Node, site: Site) -> list[dict[str, Any]]:
    """The operands that make the merged linear compute the gate, and the up projection, alone."""
    options = arguments(linear)
    layout, rows = parse(options["layout"]), options["out_features"] // 2
    weight = stored_weight(rewriter, linear)
    bias = None if options["bias"] is None else named_weight(rewriter, options["bias"])
    halves: list[dict[str, Any]] = []
    for part, begin in enumerate((0, rows)):
        name = _half_name(site.weight, part)
        stored = pack(weight[begin : begin + rows], name, layout)
        half: dict[str, Any] = {
            "weight": [rewriter.add_weight(n, t) for n, t in stored.items()],
            "out_features": rows,
        }
        if bias is not None:
            own = _half_name(bias[0], part)
            half["bias"] = rewriter.add_weight(own, bias[1][begin : begin + rows])
        halves.append(half)
    return halves


def _half_name(name: str, part: int) -> str:
    """What a half of a merged tensor was called before, or a name beside the whole."""
    members = member_names(name)
    if len(members) == 2:
        return members[part]
    head, _, tail = name.rpartition(".")
    return ".".join(filter(None, (head, ("gate", "up")[part], tail)))
