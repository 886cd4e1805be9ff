"""What the layouts of one weight cost, over all of its uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

from sparsify.contracts import CostModel, MeasuringCostModel
from sparsify.layouts import Form, Layout, PackedDense, WeightStats, form_of

_AT_PAR = 1.03
"""Times of dense that count as no slower."""


class LayoutTimes:
    """Seconds of the candidates that fit a weight.

    Attributes:
        tokens: token counts of the uses, by the form in which so many are computed.
        dense, sparse: the best single layout of each kind; ``sparse`` is None where none fits, and
            slower than dense in no form if any is.
        misfits: why candidates do not fit.
    """

    def __init__(self, cost: CostModel, stats: WeightStats, tokens: Sequence[int]) -> None:
        self.cost, self.stats = cost, stats
        self.tokens: dict[Form, list[int]] = {}
        for count in tokens:
            self.tokens.setdefault(form_of(count), []).append(count)
        offered = dict.fromkeys(
            layout for count in tokens for layout in cost.candidates(stats.shape, stats.nnz, count)
        )
        reasons = {layout: layout.fits(stats) for layout in offered}
        self.misfits = [reason for reason in reasons.values() if reason is not None]
        self._fitting = [layout for layout, reason in reasons.items() if reason is None]
        dense = [layout for layout in self._fitting if layout.is_dense]
        sparse = [layout for layout in self._fitting if not layout.is_dense]
        self.dense: Layout = min(dense or [PackedDense()], key=self.of)
        harmless = [layout for layout in sparse if self.slower_at(layout) is None]
        self.sparse = min(harmless or sparse, key=self.of) if sparse else None

    def of(self, layout: Layout) -> float:
        """Seconds of all uses with one layout."""
        return self.together(dict.fromkeys(self.tokens, layout))

    def together(self, layouts: Mapping[Form, Layout]) -> float:
        """Seconds of all uses with a layout for each form."""
        return sum(self.of_form(layout, form) for form, layout in layouts.items())

    def of_form(self, layout: Layout, form: Form) -> float:
        stats = self.stats
        return sum(
            self.cost.linear_seconds(layout, stats.shape, stats.nnz, count)
            for count in self.tokens[form]
        )

    def slower_at(self, layout: Layout) -> Form | None:
        """The form in which a layout takes longer than dense, whatever it gains in the other.

        How often a weight is used in each is not known: a prompt may come with one step or many.
        """
        return next((form for form in self.tokens if not self._at_par(layout, form)), None)

    def _at_par(self, layout: Layout, form: Form) -> bool:
        return self.of_form(layout, form) <= _AT_PAR * self.of_form(self.dense, form)

    def measured(self, layouts: Mapping[Form, Layout]) -> float | None:
        """`together` as measured; None when any part of it is predicted."""
        cost, stats, total = self.cost, self.stats, 0.0
        if not isinstance(cost, MeasuringCostModel):
            return None
        for form, layout in layouts.items():
            for count in self.tokens[form]:
                seconds = cost.measured_seconds(layout, stats.shape, stats.nnz, count)
                if seconds is None:
                    return None
                total += seconds
        return total

    def pair(self, room: float) -> dict[Form, Layout] | None:
        """The two layouts that are fastest, one for each form; None where there are none.

        Args:
            room: bytes that both may take together.
        """
        if len(self.tokens) < 2:
            return None
        pairs = (
            dict(zip(self.tokens, layouts, strict=True))
            for layouts in permutations(self._fitting, 2)
            if sum(map(self.nbytes, layouts)) <= room
        )
        harmless = (pair for pair in pairs if all(self._at_par(pair[f], f) for f in pair))
        return min(harmless, key=self.together, default=None)

    def offers(self, layout: Layout) -> bool:
        """Whether the target has kernels for the layout at one of the token counts."""
        return layout in self._fitting

    def nbytes(self, layout: Layout) -> int:
        return layout.estimate_nbytes(self.stats.shape, self.stats.nnz)
