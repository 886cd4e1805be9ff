"""Layouts for linears that may skip zeros, and where skipping pays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import fx

from sparsify import ops
from sparsify.contracts import Activity, CostModel, SkippingCostModel
from sparsify.layouts import Form, Layout, WeightStats, form_of
from sparsify.passes.graph import arguments
from sparsify.passes.sparse_linear import percent


def activity_of(node: fx.Node, tokens: int) -> Activity | None:
    """The zeros that a linear may skip; None for one that is told of none."""
    if node.target == ops.active_linear.overload:
        return Activity("inputs", ops.union_share(arguments(node)["active"], tokens))
    if node.target == ops.gated_linear.overload:
        return Activity("outputs", ops.union_share(arguments(node)["active"], tokens))
    return None


@dataclass(frozen=True)
class ActiveUse:
    """A use of a weight at a token count.

    Attributes:
        active: share of the features of one token that are not zero.
    """

    tokens: int
    activity: Activity | None = None
    active: float = 1.0


class ActiveTimes:
    """Seconds of the layouts of a weight of which at least one use may skip zeros.

    Layouts are compared by seconds a token, summed over the uses: a decode step of one token comes
    as often as a token of a prompt, and not as often as a prompt.

    Attributes:
        dense: the fastest dense layout of kernels that skip nothing.
    """

    def __init__(self, cost: CostModel, stats: WeightStats, uses: Sequence[ActiveUse]) -> None:
        self.cost, self.stats, self.uses = cost, stats, tuple(uses)
        offered: dict[Layout, None] = {}
        plain: dict[Layout, None] = {}
        for use in self.uses:
            plain.update(dict.fromkeys(cost.candidates(stats.shape, stats.nnz, use.tokens)))
            if use.activity is not None and isinstance(cost, SkippingCostModel):
                found = cost.active_candidates(stats.shape, use.tokens, use.activity)
                offered.update(dict.fromkeys(found))
        self.layouts = [layout for layout in {**offered, **plain} if layout.fits(stats) is None]
        dense = [layout for layout in self.layouts if layout.is_dense and layout in plain]
        self.dense = min(dense, key=self.plainly)

    def choose(self, room: float) -> dict[Form, Layout]:
        """The layout for each form of activations.

        Args:
            room: bytes that two layouts may take together.
        """
        forms = tuple(dict.fromkeys(form_of(use.tokens) for use in self.uses))
        choices = [dict.fromkeys(forms, layout) for layout in self.layouts]
        choices += [
            dict(zip(forms, pair, strict=True))
            for pair in permutations(self.layouts, 2)
            if len(forms) == 2 and sum(map(self._nbytes, pair)) <= room
        ]
        return min(choices, key=lambda choice: self._a_token(choice))

    def skips(self, layout: Layout, use: ActiveUse) -> bool:
        """Whether the kernel that skips zeros is the faster one."""
        return self._skipping(layout, use) <= self._plain(layout, use)

    def seconds(self, layout: Layout, use: ActiveUse) -> float:
        return min(self._plain(layout, use), self._skipping(layout, use))

    def plainly(self, layout: Layout) -> float:
        """Seconds of all uses when nothing is skipped."""
        return sum(self._plain(layout, use) for use in self.uses)

    def reason(self, layouts: Mapping[Form, Layout]) -> str:
        """What was decided for each token count."""
        found = [
            self._reason(layouts[form_of(use.tokens)], use) for use in dict.fromkeys(self.uses)
        ]
        return f"{percent(self.stats.density)} nonzero: {'; '.join(found)}"

    def _reason(self, layout: Layout, use: ActiveUse) -> str:
        count = f"{use.tokens} token{'s' if use.tokens > 1 else ''}"
        if use.activity is None:
            return f"{layout.name} at {count}"
        gain = self._plain(self.dense, use) / self.seconds(layout, use)
        union = percent(use.activity.share)
        if self.skips(layout, use):
            where = "" if use.tokens == 1 else f", {union} in the union"
            return (
                f"{percent(use.active)} of {use.activity.side} active at {count}{where}: "
                f"{layout.name} predicted {gain:.1f}x faster than dense"
            )
        if math.isinf(self._skipping(layout, use)) and not layout.is_dense:
            return f"{layout.name} predicted {gain:.1f}x faster than dense at {count} as it is"
        return f"union of {count} is not sparse ({union} active): {layout.name} computes all"

    def _a_token(self, layouts: Mapping[Form, Layout]) -> float:
        return sum(
            self.seconds(layouts[form_of(use.tokens)], use) / max(1, use.tokens)
            for use in self.uses
        )

    def _plain(self, layout: Layout, use: ActiveUse) -> float:
        return self.cost.linear_seconds(layout, self.stats.shape, self.stats.nnz, use.tokens)

    def _skipping(self, layout: Layout, use: ActiveUse) -> float:
        if use.activity is None or not isinstance(self.cost, SkippingCostModel):
            return math.inf
        found = self.cost.active_seconds(layout, self.stats.shape, use.tokens, use.activity)
        return math.inf if found is None else found

    def _nbytes(self, layout: Layout) -> int:
        return layout.estimate_nbytes(self.stats.shape, self.stats.nnz)
