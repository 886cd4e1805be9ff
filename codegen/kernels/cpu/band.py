"""Which keys a query sees by their positions, as kernels ask: block by block, and lane by lane.

The kernels' side of `sparsify.band.Band`. A bound is None where there is none, a number, or a value
that each call brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from tvm.tirx.script.builder import ir as T

from sparsify.band import Band
from sparsify.codegen.kernels.cpu.simd import Expr, bind, opaque, splat
from sparsify.layouts import LANES

_FAR = 2**30
"""Further apart than any two tokens."""

Visit = Callable[[Expr, Expr, "Expr | bool"], None]
"""``visit(begin, count, ruled)``: a block of keys, and whether any of them may be hidden."""


@dataclass(frozen=True)
class Reach:
    """Key ``j`` is hidden from query ``i`` if ``j > i + ahead``, or if ``|i - j| >= window`` and
    ``j >= sinks``."""

    ahead: Expr | int | None = None
    window: Expr | int | None = None
    sinks: Expr | int = 0

    @classmethod
    def of(cls, band: Band) -> Reach:
        return cls(0 if band.causal else None, band.window or None, band.sinks)

    @property
    def hides(self) -> bool:
        return self.ahead is not None or self.window is not None

    @property
    def _one_sided(self) -> bool:
        """Whether keys ahead of a query are hidden by ``ahead`` where the window would."""
        return isinstance(self.ahead, int) and self.ahead == 0

    @property
    def _has_sinks(self) -> bool:
        return self.window is not None and (not isinstance(self.sinks, int) or self.sinks > 0)

    def score(self, score: Expr, key: Expr, query: Expr, width: int) -> Expr:
        """The scores of a key with ``width`` queries from ``query`` on, hidden ones infinite."""
        if not self.hides:
            return score
        first = _splat(bind(T.Cast("int32", query - key)), width)
        distance = bind(first + T.Ramp(T.int32(0), T.int32(1), width) if width > 1 else first)
        infinite = splat(T.float32(float("-inf")), width)
        if self.ahead is not None:
            ahead = _splat(T.Cast("int32", T.int64(0) - self.ahead), width)
            score = T.Select(distance < ahead, infinite, score)
        if self.window is not None:
            window = T.Cast("int32", _i64(self.window))
            if self._has_sinks:
                window = bind(T.Select(key < self.sinks, T.int32(_FAR), window))
            score = T.Select(distance >= _splat(window, width), infinite, score)
            if not self._one_sided:
                score = T.Select(distance <= _splat(0 - window, width), infinite, score)
        return score

    def rules(self, begin: Expr, count: Expr, first: Expr, last: Expr) -> Expr | bool:
        """Whether a key of a block may be hidden from a query from first to last."""
        if not self.hides:
            return False
        last_key = begin + count - 1
        found: list[Expr] = []
        if self.ahead is not None:
            found.append(last_key > first + self.ahead)
        if self.window is not None:
            outside = last - begin >= self.window
            if not self._one_sided:
                outside = T.Or(outside, last_key - first >= self.window)
            found.append(T.And(outside, last_key >= self.sinks))
        return reduce(T.Or, found)

    def each_block(self, first: Expr, last: Expr, keys: Expr, step: int, visit: Visit) -> None:
        """Visits blocks of at most ``step`` keys, from those that a query from first to last sees.

        Sinks before the window come first.
        """
        begin, end, before = T.int64(0), keys, T.int64(0)
        if self.ahead is not None:
            end = T.min(end, last + self.ahead + 1)
        if self.window is not None:
            sinks = T.min(_i64(self.sinks), end)
            if not self._one_sided:
                end = T.min(end, T.max(last + self.window, sinks))
            lowest = T.min(T.max(first - self.window + 1, T.int64(0)), end)
            begin = T.floordiv(lowest, LANES) * LANES
            before = T.min(sinks, begin)
        begin, end, before = opaque(begin, end, before)
        blocks = bind(T.floordiv(T.max(end - begin, T.int64(0)) + (step - 1), step))
        early_blocks = bind(T.floordiv(before + (step - 1), step)) if self._has_sinks else 0
        with T.serial(early_blocks + blocks) as block:
            at, stop = begin + (block - early_blocks) * step, end
            if self._has_sinks:
                early = block < early_blocks
                at, stop = T.Select(early, block * step, at), T.Select(early, before, stop)
            at, stop = opaque(at, stop)
            count = bind(T.min(T.int64(step), stop - at))
            visit(at, count, self.rules(at, count, first, last))


def _i64(value: Expr | int) -> Expr:
    return T.int64(value) if isinstance(value, int) else value


def _splat(value: Expr, width: int) -> Expr:
    return T.Broadcast(value, width) if width > 1 else value
