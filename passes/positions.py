"""Reading mask code: which keys a query sees by their positions alone, in any spelling."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparsify.passes.graph import COPIES, arguments, aten, same, shape_of
from sparsify.passes.iota import AND, COMPARISONS, FLIPPED, NOT, OR, constant, iota, is_bool
from sparsify.rewriter import Rewriter

_NEGATED = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}
_SUMS = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}
_PLACED = (*COPIES, aten.expand.default, aten.unsqueeze.default, aten.view.default)
LARGEST_STORED = 1 << 26
"""Elements of a stored mask that are still read."""


@dataclass(frozen=True)
class Region:
    """The pairs with ``low <= query - key <= high`` (or ``key < sinks``), of one chunk each.

    Attributes:
        low, high: None: no bound. ``key < sinks`` is excused from ``high`` alone.
        prefix: only keys below it are seen; None: all.
        chunk: query and key are in one run of so many positions; 0: anywhere.
        exact: the mask shows all of the region; else it shows a part of it.
    """

    low: int | None = None
    high: int | None = None
    sinks: int = 0
    prefix: int | None = None
    chunk: int = 0
    exact: bool = True

    @property
    def is_all(self) -> bool:
        return self == Region()

    @property
    def band(self) -> tuple[bool, int, int]:
        """The ``causal, window, sinks`` that hide most and nothing that the region shows."""
        low, high = self.low, self.high
        if self.chunk:
            last = self.chunk - 1
            low = -last if low is None else max(low, -last)
            high = last if high is None else min(high, last)
        causal = low is not None and low >= 0
        if high is None or low is None:
            return causal, 0, 0
        return causal, max(1, high + 1, 0 if causal else 1 - low), self.sinks

    @property
    def is_band(self) -> bool:
        """Whether the band is the region and no more."""
        plain = self.exact and self.prefix is None and not self.chunk
        if self.high is None:
            return plain and self.low in (None, 0)
        one_sided = self.low == 0
        return (
            plain and self.high >= 0 and (one_sided or (self.low == -self.high and not self.sinks))
        )

    def meet(self, other: Region) -> Region | None:
        """The region of what both show; None where it is none."""
        if self.high is not None and other.high is not None and self.sinks != other.sinks:
            return None
        if 0 not in (self.chunk, other.chunk) and self.chunk != other.chunk:
            return None
        return Region(
            _tighter(max, self.low, other.low),
            _tighter(min, self.high, other.high),
            max(self.sinks, other.sinks),
            _tighter(min, self.prefix, other.prefix),
            self.chunk or other.chunk,
            self.exact and other.exact,
        )

    def join(self, other: Region) -> Region | None:
        """A window or the first keys: the only two whose union is a region."""
        window, first = (other, self) if other.prefix is None else (self, other)
        if first != Region(low=window.low, prefix=first.prefix) or first.prefix is None:
            return None
        if window != Region(window.low, window.high) or window.high is None:
            return None
        return replace(window, sinks=first.prefix)


def region(rewriter: Rewriter, node: object) -> Region | None:
    """What a bool mask shows, over its last two dims; None where more than positions decides."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not is_bool(node):
        return None
    if constant(rewriter, node) is True:
        return Region()
    weight = rewriter.weight_of(node)
    if weight is not None:
        return stored(weight)
    if node.op != "call_function":
        return None
    target = node.target
    if target in (aten.tril.default, aten.triu.default):
        whole, cut = region(rewriter, node.args[0]), -arguments(node)["diagonal"]
        kept = Region(low=cut) if target == aten.tril.default else Region(high=cut)
        return None if whole is None else whole.meet(kept)
    if target in COMPARISONS:
        return _compared(rewriter, COMPARISONS[target], *node.args[:2])
    if target in NOT:
        return _negated(rewriter, node.args[0])
    if target in AND + OR:
        left, right = (region(rewriter, a) for a in node.args[:2])
        if left is None or right is None:
            return None
        return left.meet(right) if target in AND else left.join(right)
    return region(rewriter, node.args[0]) if _is_first(node) or keeps_plane(node) else None


def _is_first(node: fx.Node) -> bool:
    """Whether a slice begins at the first position and leaves none out."""
    if node.target != aten.slice.Tensor:
        return False
    return arguments(node)["start"] in (None, 0) and arguments(node)["step"] == 1


def keeps_plane(node: fx.Node) -> bool:
    """Whether a node places its operand anew, and leaves the last two dims what they were."""
    if node.target not in _PLACED or node.args[0].meta["val"].dim() < 2:
        return False
    before, after = shape_of(node.args[0]), shape_of(node)
    return all(same(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))


@dataclass(frozen=True)
class _Linear:
    """``query * q + key * k + offset``, of positions."""

    query: int
    key: int
    offset: int

    def plus(self, other: _Linear, sign: int) -> _Linear:
        return _Linear(
            self.query + sign * other.query,
            self.key + sign * other.key,
            self.offset + sign * other.offset,
        )


def _linear(rewriter: Rewriter, node: object) -> _Linear | None:
    number = constant(rewriter, node)
    if number is not None:
        return _Linear(0, 0, int(number)) if number == int(number) else None
    if not isinstance(node, fx.Node):
        return None
    ramp = iota(rewriter, node)
    if ramp is not None:
        if same(ramp.length, 1):
            return _Linear(0, 0, ramp.offset)
        if ramp.dim not in (-1, -2):
            return None
        return _Linear(int(ramp.dim == -2), int(ramp.dim == -1), ramp.offset)
    if node.op != "call_function":
        return None
    if node.target in _SUMS and arguments(node)["alpha"] == 1:
        left, right = (_linear(rewriter, a) for a in node.args[:2])
        if left is None or right is None:
            return None
        return left.plus(right, _SUMS[node.target])
    if node.target == aten.neg.default:
        inner = _linear(rewriter, node.args[0])
        return None if inner is None else _Linear(0, 0, 0).plus(inner, -1)
    return _linear(rewriter, node.args[0]) if keeps_plane(node) else None


def _compared(rewriter: Rewriter, name: str, left: object, right: object) -> Region | None:
    weight, number = corner_of_weight(rewriter, left), constant(rewriter, right)
    if weight is not None and number is not None:
        return stored(getattr(operator, name)(weight, number))
    if name == "eq":
        return _same_chunk(rewriter, left, right)
    if name not in FLIPPED:
        return None
    for one, other, flipped in ((left, right, name), (right, left, FLIPPED[name])):
        if isinstance(one, fx.Node) and one.target == aten.abs.default and flipped in ("le", "lt"):
            return _near(rewriter, one, other, flipped)
    first, second = _linear(rewriter, left), _linear(rewriter, right)
    if first is None or second is None:
        return None
    line = first.plus(second, -1)
    if (line.query, line.key) in ((-1, 1), (0, 1)):
        line, name = _Linear(0, 0, 0).plus(line, -1), FLIPPED[name]
    strict = name in ("lt", "gt")
    bound = -line.offset
    if (line.query, line.key) == (1, -1):
        if name in ("ge", "gt"):
            return Region(low=bound + strict)
        return Region(high=bound - strict)
    if (line.query, line.key) == (0, -1) and name in ("ge", "gt"):
        # -key >= bound
        return Region(prefix=max(0, 1 - bound - strict))
    return None


def corner_of_weight(rewriter: Rewriter, node: object) -> torch.Tensor | None:
    """The stored mask whose first queries and keys a node is."""
    if not isinstance(node, fx.Node):
        return None
    weight = rewriter.weight_of(node)
    if weight is not None or node.op != "call_function":
        return weight if weight is not None and weight.numel() <= LARGEST_STORED else None
    return (
        corner_of_weight(rewriter, node.args[0]) if _is_first(node) or keeps_plane(node) else None
    )


def _near(rewriter: Rewriter, distance: fx.Node, bound: object, name: str) -> Region | None:
    """``|query - key + c| <= bound``."""
    line, limit = _linear(rewriter, distance.args[0]), constant(rewriter, bound)
    if line is None or limit is None or limit != int(limit):
        return None
    if (line.query, line.key) == (-1, 1):
        line = _Linear(0, 0, 0).plus(line, -1)
    if (line.query, line.key) != (1, -1):
        return None
    reach = int(limit) - (name == "lt")
    return Region(-reach - line.offset, reach - line.offset)


def _same_chunk(rewriter: Rewriter, left: object, right: object) -> Region | None:
    """``query // c == key // c``."""
    parts = [_floor(rewriter, side) for side in (left, right)]
    if parts[0] is None or parts[1] is None:
        return None
    (one, size), (other, other_size) = parts[0], parts[1]
    sides = {(one.query, one.key), (other.query, other.key)}
    if size != other_size or one.offset or other.offset or sides != {(1, 0), (0, 1)}:
        return None
    return Region(chunk=size)


def _floor(rewriter: Rewriter, node: object) -> tuple[_Linear, int] | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode):
        if arguments(node)["rounding_mode"] != "floor":
            return None
    elif node.target != aten.floor_divide.default:
        return _floor(rewriter, node.args[0]) if keeps_plane(node) else None
    line, size = _linear(rewriter, node.args[0]), constant(rewriter, node.args[1])
    if line is None or not isinstance(size, int) or size < 1:
        return None
    return line, size


def _negated(rewriter: Rewriter, node: fx.Node) -> Region | None:
    """`region` of what a bool mask does not show."""
    if node.target in NOT:
        return region(rewriter, node.args[0])
    if keeps_plane(node):
        return _negated(rewriter, node.args[0])
    if node.target in COMPARISONS and COMPARISONS[node.target] in _NEGATED:
        return _compared(rewriter, _NEGATED[COMPARISONS[node.target]], *node.args[:2])
    if node.target in (aten.tril.default, aten.triu.default):
        if constant(rewriter, node.args[0]) is not True:
            return None
        cut = -arguments(node)["diagonal"]
        return Region(high=cut - 1) if node.target == aten.tril.default else Region(low=cut + 1)
    if node.target in OR:
        left, right = (_negated(rewriter, a) for a in node.args[:2])
        return None if left is None or right is None else left.meet(right)
    return None


def stored(weight: torch.Tensor) -> Region | None:
    """Bounds of what a stored mask shows, bool or added; exact where they say all of it."""
    if weight.dim() < 2 or not 0 < weight.numel() <= LARGEST_STORED or weight.shape[-2] == 1:
        return None
    rows, columns = weight.shape[-2:]
    weight = weight.detach().reshape(-1, rows, columns)
    added = weight.is_floating_point()
    shown = weight != float("-inf") if added else weight.bool()
    query, key = shown.any(0).nonzero(as_tuple=True)
    if not len(query):
        return None
    distance = query - key
    low, high = int(distance.min()), int(distance.max())
    found = Region(None if low == 1 - columns else low, None if high == rows - 1 else high)
    whole = torch.ones(rows, columns, dtype=torch.bool).tril(-low).triu(-high)
    exact = bool((shown == whole).all()) and not (added and bool(weight[shown].any()))
    return replace(found, exact=exact)


def _tighter(pick: Callable[[int, int], int], left: int | None, right: int | None) -> int | None:
    if left is None or right is None:
        return right if left is None else left
    return pick(left, right)
