"""Rotary position embedding becomes one operator on unsplit projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.extents import Extents
from sparsify.passes.graph import (
    Extent,
    arguments,
    aten,
    is_tensor,
    operand,
    past_copies,
    same,
    same_shape,
    shape_of,
)
from sparsify.passes.heads import (
    HEADS_FIRST,
    TOKENS_FIRST,
    as_rows,
    heads_of,
    replace_by_rows,
)
from sparsify.passes.strided import Strided, same_view, strided
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class FuseRotary(GraphPass):
    """``x * cos + rotate_half(x) * sin`` becomes ``rotary`` on row-major activations.

    Before::

        x: [b, s, h*d] -> view [b, s, h, d] -> permute [b, h, s, d] = q
        cos, sin: [b, s, d] -> unsqueeze [b, 1, s, d]
        add(mul(q, cos), mul(cat(neg(upper half of q), lower half of q), sin))

    After::

        rotary(x, cos, sin, h, d): [b, s, h*d] -> view [b, s, h, d] -> permute [b, h, s, d]

    The halves may be spelled by slices, chunk or split, and the heads may also stand behind the
    tokens, ``[b, s, h, d]``. An ``x`` that is not cut straight from row-major activations is
    copied first. Run it before `FuseAttention`, which then reads the heads from ``rotary``.
    """

    name = "fuse_rotary"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        angles = _Angles(rewriter)
        for node in rewriter.nodes:
            found = _rotation(node)
            if found is None:
                continue
            if isinstance(found, str):
                yield Decision(node.name, "rotary", "skipped", found, self.name)
            else:
                yield self._fuse(rewriter, angles, node, found)

    def _fuse(
        self, rewriter: Rewriter, angles: _Angles, node: fx.Node, found: _Rotation
    ) -> Decision:
        x, axis = found.x, found.axis
        shape = shape_of(x)
        heads, head_dim, length = shape[axis], shape[3], shape[3 - axis]
        assert isinstance(heads, int) and isinstance(head_dim, int)
        part = heads_of(x, axis)
        with rewriter.graph.inserting_before(node):
            if part is None or part.count != heads:
                rows, how = as_rows(rewriter, x, axis), "copied into rows first"
            else:
                rows, how = part.rows(rewriter), "read straight from the projection"
                first, last = part.offset, part.offset + heads * head_dim
                if last - first != part.shape[2]:
                    rows = rewriter.call(aten.slice.Tensor, (rows, 2, first, last))
            tokens = (shape[0], length, head_dim)
            cos, sin = (angles.rows(a, tokens, axis) for a in (found.cos, found.sin))
            turned = rewriter.call(ops.rotary.overload, (rows, cos, sin, heads, head_dim))
            replace_by_rows(rewriter, node, turned, axis)
        reason = f"{heads} heads of {head_dim} features, {how}"
        return Decision(node.name, "rotary", "rewritten", reason, self.name)


@dataclass(frozen=True)
class _Rotation:
    x: fx.Node
    cos: fx.Node
    sin: fx.Node

    @property
    def axis(self) -> int:
        """Where the heads of x stand: the angles are the same for all of them."""
        if same(_extent(self.x, HEADS_FIRST), 1) or not self._is_alike(HEADS_FIRST):
            return TOKENS_FIRST if self._is_alike(TOKENS_FIRST) else HEADS_FIRST
        return HEADS_FIRST

    def _is_alike(self, axis: int) -> bool:
        return all(same(_extent(angle, axis), 1) for angle in (self.cos, self.sin))


def _rotation(node: fx.Node) -> _Rotation | str | None:
    """The parts of a rotation; why it is none although it turns halves; or None."""
    if node.target != aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    reason = None
    for straight, crossed in _orders(node):
        if straight.target != aten.mul.Tensor or crossed.target != aten.mul.Tensor:
            continue
        for turned, sin in _orders(crossed):
            source = past_copies(turned)
            if source.target != aten.cat.default or not _is_negated_first(source):
                continue
            for x, cos in _orders(straight):
                if _turns(source, x):
                    found = _Rotation(x, cos, sin)
                    return _misfit(found) or found
            reason = "the halves that are turned are not those of the tensor beside them"
    return reason


def _orders(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    left, right = operand(node), operand(node, 1)
    if is_tensor(left) and is_tensor(right):
        yield left, right
        yield right, left


def _is_negated_first(cat: fx.Node) -> bool:
    parts = operand(cat)
    return len(parts) == 2 and past_copies(parts[0]).target == aten.neg.default


def _turns(cat: fx.Node, x: fx.Node) -> bool:
    """Whether a concatenation is ``(-upper half of x, lower half of x)`` over the last dim."""
    options = arguments(cat)
    negated, lower = options["tensors"]
    view = strided(x)
    if options["dim"] % len(view.dims) != len(view.dims) - 1 or len(view.dims[-1]) != 1:
        return False
    extent, stride = view.dims[-1][0]
    if not isinstance(extent, int) or extent % 2:
        return False
    half = extent // 2
    last = ((half, stride),) if half > 1 else ()
    first = replace(view, dims=(*view.dims[:-1], last))
    second = replace(first, offset=view.offset + half * stride)
    upper = operand(past_copies(negated))
    return _is(lower, first) and _is(upper, second)


def _is(node: fx.Node, view: Strided) -> bool:
    return same_view(strided(node), view)


def _misfit(found: _Rotation) -> str | None:
    shape = shape_of(found.x)
    if len(shape) != 4:
        return f"x has {len(shape)} dimensions, not [batch, heads, length, head_dim]"
    axis = found.axis
    for name, angle in (("cosine", found.cos), ("sine", found.sin)):
        if not same(_extent(angle, axis), 1):
            return f"the {name} differs from head to head"
        own = shape_of(angle)
        if len(own) > 4 or not own or not same(own[-1], shape[3]):
            return f"the {name} has shape {list(own)} for heads of {shape[3]} features"
    if not isinstance(shape[axis], int):
        return "the number of heads is dynamic"
    dtypes = {n.meta["val"].dtype for n in (found.x, found.cos, found.sin)}
    if dtypes != {torch.float32}:
        return f"operands are {', '.join(sorted(map(str, dtypes)))}, not float32"
    return None


def _extent(node: fx.Node, axis: int) -> Extent:
    """The extent at an axis of four, as broadcasting aligns it."""
    shape = shape_of(node)
    position = axis - 4 + len(shape)
    return shape[position] if position >= 0 else 1


@dataclass(frozen=True)
class _Angles:
    """Cosines and sines as ``[b, s, head_dim]``, one node for all the rotations that use them."""

    rewriter: Rewriter
    made: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)

    def rows(self, node: fx.Node, shape: tuple[Extent, ...], axis: int) -> fx.Node:
        node = past_copies(node)
        if (node, axis) not in self.made:
            self.made[node, axis] = self._rows(node, shape, axis)
        return self.made[node, axis]

    def _rows(self, node: fx.Node, shape: tuple[Extent, ...], axis: int) -> fx.Node:
        if node.target == aten.unsqueeze.default and same_shape(shape_of(operand(node)), shape):
            return operand(node)
        extents = Extents(self.rewriter)
        position = axis - 4 + len(shape_of(node))
        if position >= 0:
            node = self.rewriter.call(aten.squeeze.dim, (node, position))
        if same_shape(shape_of(node), shape):
            return node
        sizes = [extents.node(extent) for extent in shape]
        return self.rewriter.call(aten.expand.default, (node, sizes))
