"""Binds every linear to the layout that the target is predicted to run fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sparsify import ops
from sparsify.layouts import Dense, Layout, PackedDense, WeightStats, parse
from sparsify.passes.graph import arguments, hint, operand, product, shape_of
from sparsify.passes.sites import is_disabled, linear_site, pack, stored_weight
from sparsify.passes.sparse_linear import percent
from sparsify.program import CostModel, PassContext, PassResult, ProgramSet, Rewriter, Site
from sparsify.report import Decision

_LINEAR = ops.sparse_linear.overload
_DENSE = (Dense.name, PackedDense.name)


@dataclass(frozen=True)
class SelectLayout:
    """Each weight moves from its canonical form to the layout chosen for one target.

    Before::

        sparse_linear(x, [values, columns, offsets], "csr", N, K, ...)

    After::

        sparse_linear(x, [starts, outputs, columns, values], "sell{rows=8,...}", N, K, ...)

    The choice minimises the predicted time, summed over every use of the weight in all entry
    programs, so that they share one packing. Dense is one of the candidates. Specialising: it
    needs a cost model.

    Attributes:
        layout: a layout spec to use wherever it fits, instead of choosing.
        tokens: token count to choose for; 0 takes it from the example inputs.
    """

    layout: str = ""
    tokens: int = 0

    name: ClassVar[str] = "select_layout"
    tolerance: ClassVar[float] = 1e-5

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        if context.cost is None:
            raise ValueError(
                "select_layout chooses by predicted time but the context has no cost model; "
                "specialise the program for a target"
            )
        rewriters = [program.rewrite() for program in programs]
        uses: dict[str, list[_Use]] = {}
        for rewriter in rewriters:
            for node in rewriter.nodes:
                if node.target == _LINEAR:
                    use = _Use(rewriter, node, linear_site(rewriter, node))
                    uses.setdefault(use.site.weight, []).append(use)
        decisions = [self._bind(group, context, context.cost) for group in uses.values()]
        done = tuple(rewriter.finish() for rewriter in rewriters)
        return PassResult(ProgramSet(done), tuple(decisions))

    def _bind(self, uses: list[_Use], context: PassContext, cost: CostModel) -> Decision:
        site = uses[0].site
        weight = uses[0].weight()
        stats = WeightStats.of(weight)
        tokens = [self.tokens or use.tokens() for use in uses]
        times = _Times(cost, stats, tokens)
        layout, reason = self._choose(site, stats, times, context)
        stored = pack(weight, site.weight, layout)
        placed: dict[int, list[fx.Node]] = {}
        for use in uses:
            key = id(use.rewriter)
            if key not in placed:
                placed[key] = [use.rewriter.add_weight(n, t) for n, t in stored.items()]
            use.bind(placed[key], layout)
        return Decision(
            site.name,
            "linear",
            "dense" if layout.name in _DENSE else "sparse",
            reason,
            self.name,
            shape=site.shape,
            density=stats.density,
            layout=layout.spec,
            bytes_stored=sum(tensor.nbytes for tensor in stored.values()),
            bytes_dense=weight.nbytes,
            predicted_seconds=times.of(layout),
            dense_seconds=times.of(times.dense),
        )

    def _choose(
        self, site: Site, stats: WeightStats, times: _Times, context: PassContext
    ) -> tuple[Layout, str]:
        nonzero = f"{percent(stats.density)} nonzero"
        if is_disabled(site.name, context.disabled_sites):
            return times.dense, "switched off by the caller: dense"
        if self.layout:
            forced = parse(self.layout)
            misfit = forced.fits(stats)
            if misfit is None:
                return forced, f"{nonzero}: {forced.name} as the option layout={self.layout} says"
            return times.dense, f"layout={self.layout} does not fit: {misfit}"
        if times.sparse is None:
            why = times.misfits[0] if times.misfits else "the target has no kernel for one"
            return times.dense, f"{nonzero}: no sparse layout fits: {why}"
        dense_time, sparse_time = times.of(times.dense), times.of(times.sparse)
        count = f"{times.tokens[0]} token{'s' if times.tokens[0] != 1 else ''}"
        if sparse_time < dense_time:
            gain = f"{dense_time / sparse_time:.1f}x faster than dense"
            return times.sparse, f"{nonzero}: {times.sparse.name} predicted {gain} at {count}"
        if stats.density == 1.0:
            return times.dense, f"{nonzero}: dense is the fastest layout"
        gain = f"{sparse_time / dense_time:.1f}x faster than {times.sparse.name}"
        return times.dense, f"{nonzero}: dense predicted {gain} at {count}"


@dataclass(frozen=True)
class _Use:
    """One linear of one entry program."""

    rewriter: Rewriter
    node: fx.Node
    site: Site

    def weight(self) -> torch.Tensor:
        return stored_weight(self.rewriter, self.node)

    def tokens(self) -> int:
        return hint(product(shape_of(operand(self.node))[:-1]))

    def bind(self, tensors: list[fx.Node], layout: Layout) -> None:
        options = {**arguments(self.node), "weight": tensors, "layout": layout.spec}
        self.node.args = tuple(options.values())
        self.node.kwargs = {}


class _Times:
    """Predicted seconds of the candidates that fit one weight, over all of its uses."""

    def __init__(self, cost: CostModel, stats: WeightStats, tokens: Sequence[int]) -> None:
        self.cost, self.stats, self.tokens = cost, stats, tokens
        self.misfits: list[str] = []
        dense: list[Layout] = []
        sparse: list[Layout] = []
        for layout in cost.candidates(stats.shape, stats.nnz):
            misfit = layout.fits(stats)
            if misfit is not None:
                self.misfits.append(misfit)
            else:
                (dense if layout.name in _DENSE else sparse).append(layout)
        self.dense = min(dense or [PackedDense()], key=self.of)
        self.sparse = min(sparse, key=self.of) if sparse else None

    def of(self, layout: Layout) -> float:
        stats = self.stats
        return sum(
            self.cost.linear_seconds(layout, stats.shape, stats.nnz, count) for count in self.tokens
        )
