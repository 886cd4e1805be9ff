"""Binds every linear to the layout that the target runs fastest, by prediction or measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import Activity, CostModel, MeasuringCostModel, PassContext, PassResult
from sparsify.layouts import Dense, Form, Layout, WeightStats, form_of, parse
from sparsify.passes.active_layouts import ActiveTimes, ActiveUse, activity_of
from sparsify.passes.graph import arguments, aten, operand
from sparsify.passes.layout_times import LayoutTimes
from sparsify.passes.sites import is_disabled, linear_site, named_weight, pack, stored_weight
from sparsify.passes.sparse_linear import percent
from sparsify.program import ProgramSet, Site
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class SelectLayout:
    """Each weight moves from its canonical form to the layout chosen for one target.

    Before::

        sparse_linear(x, [values, columns, offsets], "csr", N, K, ...)

    After::

        sparse_linear(x, [starts, outputs, columns, values], "sell{rows=8,...}", N, K, ...)

    The choice minimises the time, summed over every use of the weight in all entry programs, so
    that they share one packing. A weight that is used at few tokens and at many is kept in two
    layouts where they are faster together and memory allows. Dense is one of the candidates; a
    dense weight that something else reads as a plain matrix, a tied embedding, stays one for few
    tokens, so that it is in memory once. What an earlier compilation measured is kept to.

    ``active_linear`` and ``gated_linear`` keep their operator where a kernel that skips zeros is
    predicted to be the faster one; elsewhere, as for many tokens of which no feature is zero in
    all, they become ``sparse_linear`` again, times the gate. See `ActiveTimes`.
    Specialising: it needs a cost model.

    Attributes:
        layout: a layout spec to use wherever it fits, instead of choosing.
        tokens: token count to choose for; 0 for what the example inputs and the bounds of dynamic
            dims let expect.
        both: most bytes of two layouts of a weight together, over its bytes in dense float32; 0
            for never two.
    """

    layout: str = ""
    tokens: int = 0
    both: float = 1.3

    name: ClassVar[str] = "select_layout"
    tolerance: ClassVar[float] = 1e-5

    def run(self, programs: ProgramSet, context: PassContext) -> PassResult:
        cost = context.cost
        if cost is None:
            raise ValueError(
                "select_layout chooses by predicted time but the context has no cost model; "
                "specialise the program for a target"
            )
        rewriters = [Rewriter(program) for program in programs]
        uses: dict[str, list[_Use]] = {}
        for rewriter in rewriters:
            for node in rewriter.nodes:
                if node.target in ops.LINEARS:
                    use = _Use.of(rewriter, node, self.tokens)
                    uses.setdefault(use.site.weight, []).append(use)
        if isinstance(cost, MeasuringCostModel):
            cost.measure(self._open(uses.values(), context))
        plain = {where for rewriter in rewriters for where in _plain_matrices(rewriter)}
        decisions = [
            self._bind_active(group, context, cost)
            if self._may_skip(group, context)
            else self._bind(group, plain, context, cost)
            for group in uses.values()
        ]
        done = tuple(rewriter.finish() for rewriter in rewriters)
        return PassResult(ProgramSet(done), tuple(decisions))

    def _open(
        self, uses: Iterable[list[_Use]], context: PassContext
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The weights whose layout measurements would decide, and their token counts."""
        for group in uses:
            off = is_disabled(group[0].site.name, context.disabled_sites)
            if not self.layout and not off and not self._may_skip(group, context):
                yield group[0].weight(), [use.tokens for use in group]

    def _may_skip(self, uses: list[_Use], context: PassContext) -> bool:
        off = bool(self.layout) or is_disabled(uses[0].site.name, context.disabled_sites)
        return not off and any(use.activity is not None for use in uses)

    def _bind_active(self, uses: list[_Use], context: PassContext, cost: CostModel) -> Decision:
        site, weight = uses[0].site, uses[0].weight()
        stats = WeightStats.of(weight)
        tuned = isinstance(cost, MeasuringCostModel)
        # A weight of this shape elsewhere may have been measured: no match for a prediction.
        cost = cost.predicted if isinstance(cost, MeasuringCostModel) else cost
        times = ActiveTimes(cost, stats, [use.active() for use in uses])
        layouts = times.choose(self.both * 4 * site.shape[0] * site.shape[1])
        packed = {layout: _stored(uses, weight, layout) for layout in layouts.values()}
        skipping = False
        for use in uses:
            layout = layouts[form_of(use.tokens)]
            skips = times.skips(layout, use.active())
            skipping = skipping or skips
            use.bind(packed[layout], layout, skips=skips)
        return Decision(
            site.name,
            "linear",
            "sparse" if skipping or not all(layout.is_dense for layout in packed) else "dense",
            times.reason(layouts) + _UNTIMED * tuned,
            self.name,
            shape=site.shape,
            density=stats.density,
            layout=" + ".join(layout.spec for layout in packed),
            bytes_stored=sum(t.nbytes for stored in packed.values() for t in stored.values()),
            bytes_dense=weight.nbytes,
            predicted_seconds=sum(
                times.seconds(layouts[form_of(use.tokens)], use) for use in times.uses
            ),
            dense_seconds=times.plainly(times.dense),
        )

    def _bind(
        self, uses: list[_Use], plain: set[int], context: PassContext, cost: CostModel
    ) -> Decision:
        site, weight = uses[0].site, uses[0].weight()
        stats = WeightStats.of(weight)
        times = LayoutTimes(cost, stats, [use.tokens for use in uses])
        choice = self._measured_before(site, times, context) or self._choose(site, times, context)
        few = choice.of.get("rows")
        if few is not None and few.is_dense and uses[0].is_one_of(plain) and times.offers(Dense()):
            choice = replace(
                choice,
                of={**choice.of, "rows": Dense()},
                reason=f"{choice.reason}; as the plain matrix that is in memory anyway",
            )
        packed: dict[Layout, dict[str, torch.Tensor]] = {}
        for use in uses:
            layout = choice.of[form_of(use.tokens)]
            if layout == use.layout and use.activity is None:
                packed[layout] = use.operands()
                continue
            if layout not in packed:
                packed[layout] = pack(weight, site.weight, layout)
            use.bind(packed[layout], layout)
        return Decision(
            site.name,
            "linear",
            "dense" if all(layout.is_dense for layout in packed) else "sparse",
            choice.reason,
            self.name,
            shape=site.shape,
            density=stats.density,
            layout=" + ".join(layout.spec for layout in packed),
            bytes_stored=sum(t.nbytes for stored in packed.values() for t in stored.values()),
            bytes_dense=weight.nbytes,
            predicted_seconds=times.together(choice.of),
            dense_seconds=times.of(times.dense),
            measured_seconds=choice.measured or times.measured(choice.of),
        )

    def _measured_before(
        self, site: Site, times: LayoutTimes, context: PassContext
    ) -> _Choice | None:
        """The choice of an earlier compilation; None where it does not serve here."""
        before = context.measured.get(site.name)
        if before is None or self.layout or is_disabled(site.name, context.disabled_sites):
            return None
        layouts = {form: parse(spec) for form, spec in before.layouts.items()}
        if layouts.keys() != times.tokens.keys() or not all(map(times.offers, layouts.values())):
            return None
        names = " and ".join(dict.fromkeys(layout.name for layout in layouts.values()))
        reason = f"{percent(times.stats.density)} nonzero: {names}, measured when first compiled"
        return _Choice(layouts, reason, before.seconds)

    def _choose(self, site: Site, times: LayoutTimes, context: PassContext) -> _Choice:
        nonzero = f"{percent(times.stats.density)} nonzero"
        single, reason = self._one(site, times, context, nonzero)
        choice = _Choice(dict.fromkeys(times.tokens, single), reason)
        if self.layout or is_disabled(site.name, context.disabled_sites):
            return choice
        pair = times.pair(self.both * 4 * site.shape[0] * site.shape[1])
        if pair is None or times.together(pair) >= times.of(single):
            return choice
        parts = " and ".join(
            f"{layout.name} at {_tokens(times.tokens[form])} "
            f"({_size(times.nbytes(layout))}, {_duration(times.of_form(layout, form))})"
            for form, layout in pair.items()
        )
        gain = f"{times.of(single) / times.together(pair):.1f}x faster than {single.name} for both"
        return _Choice(pair, f"{nonzero}: {parts} {_how(times, pair)} {gain}")

    def _one(
        self, site: Site, times: LayoutTimes, context: PassContext, nonzero: str
    ) -> tuple[Layout, str]:
        """The best single layout."""
        if is_disabled(site.name, context.disabled_sites):
            return times.dense, "switched off by the caller: dense"
        if self.layout:
            forced = parse(self.layout)
            misfit = forced.fits(times.stats)
            if misfit is None:
                return forced, f"{nonzero}: {forced.name} as the option layout={self.layout} says"
            return times.dense, f"layout={self.layout} does not fit: {misfit}"
        if times.sparse is None:
            why = times.misfits[0] if times.misfits else "the target has no kernel for one"
            return times.dense, f"{nonzero}: no sparse layout fits: {why}"
        dense_time, sparse_time = times.of(times.dense), times.of(times.sparse)
        count = _tokens([n for counts in times.tokens.values() for n in counts])
        if sparse_time < dense_time:
            how = _how(times, dict.fromkeys(times.tokens, times.sparse))
            slower = times.slower_at(times.sparse)
            if slower is None:
                gain = f"{dense_time / sparse_time:.1f}x faster than dense"
                return times.sparse, f"{nonzero}: {times.sparse.name} {how} {gain} at {count}"
            longer = times.of_form(times.sparse, slower) / times.of_form(times.dense, slower)
            where = _tokens(times.tokens[slower])
            return times.dense, (
                f"{nonzero}: dense, since {times.sparse.name} is {how} to take {longer:.2f} of its "
                f"time at {where}, and both together take too many bytes"
            )
        if times.stats.density == 1.0:
            return times.dense, f"{nonzero}: dense is the fastest layout"
        how = _how(times, dict.fromkeys(times.tokens, times.dense))
        gain = f"{sparse_time / dense_time:.1f}x faster than {times.sparse.name}"
        return times.dense, f"{nonzero}: dense {how} {gain} at {count}"


_UNTIMED = "; predicted, since tuning times no kernels that skip zeros"


def _stored(uses: Sequence[_Use], weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of a layout as a use has them already, or packed."""
    for use in uses:
        if use.layout == layout:
            return use.operands()
    return pack(weight, uses[0].site.weight, layout)


def _how(times: LayoutTimes, layouts: Mapping[Form, Layout]) -> str:
    return "predicted" if times.measured(layouts) is None else "measured"


def _tokens(counts: Sequence[int]) -> str:
    distinct = sorted(set(counts))
    return f"{', '.join(map(str, distinct))} token{'s' if distinct != [1] else ''}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} us"


@dataclass(frozen=True)
class _Choice:
    """The layout for each form of activations in which the weight is used.

    Attributes:
        measured: seconds, where an earlier compilation measured them.
    """

    of: dict[Form, Layout]
    reason: str
    measured: float | None = None


@dataclass(frozen=True)
class _Use:
    """One linear of one entry program, at a token count."""

    rewriter: Rewriter
    node: fx.Node
    site: Site
    tokens: int

    @classmethod
    def of(cls, rewriter: Rewriter, node: fx.Node, tokens: int) -> _Use:
        site = linear_site(rewriter, node)
        return cls(rewriter, node, site, tokens or ops.expected_tokens(operand(node).meta["val"]))

    @property
    def layout(self) -> Layout:
        return parse(arguments(self.node)["layout"])

    @property
    def activity(self) -> Activity | None:
        return activity_of(self.node, self.tokens)

    def active(self) -> ActiveUse:
        share = arguments(self.node).get("active", 1.0)
        return ActiveUse(self.tokens, self.activity, share)

    def weight(self) -> torch.Tensor:
        return stored_weight(self.rewriter, self.node)

    def operands(self) -> dict[str, torch.Tensor]:
        """The stored tensors that it reads, by name."""
        return dict(named_weight(self.rewriter, w) for w in arguments(self.node)["weight"])

    def is_one_of(self, places: set[int]) -> bool:
        """Whether its weight is a plain matrix that lies at one of the addresses."""
        return self.layout == Dense() and any(
            t.data_ptr() in places for t in self.operands().values()
        )

    def bind(self, stored: Mapping[str, torch.Tensor], layout: Layout, skips: bool = False) -> None:
        """Gives the linear its weight; one that skips nothing becomes a plain one."""
        tensors = [self.rewriter.add_weight(name, tensor) for name, tensor in stored.items()]
        options = {**arguments(self.node), "weight": tensors, "layout": layout.spec}
        if self.activity is None or skips:
            self.node.args = tuple(options.values())
            self.node.kwargs = {}
            return
        gate = options.pop("gate", None)
        del options["active"]
        with self.rewriter.graph.inserting_before(self.node):
            plain = self.rewriter.call(ops.sparse_linear.overload, tuple(options.values()))
            if gate is not None:
                plain = self.rewriter.call(aten.mul.Tensor, (gate, plain))
        self.rewriter.replace(self.node, plain)


def _plain_matrices(rewriter: Rewriter) -> Iterator[int]:
    """Where the weights lie in memory that anything but a linear reads, such as an embedding."""
    for node in rewriter.nodes:
        weight = rewriter.weight_of(node)
        if weight is not None and any(user.target not in ops.LINEARS for user in node.users):
            yield weight.data_ptr()
