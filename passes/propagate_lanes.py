"""Keeps activations in lanes from one kernel to the next; conversions remain at the borders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.layouts import form_of
from sparsify.ops import expected_tokens
from sparsify.passes.elementwise import Elementwise, elementwise
from sparsify.passes.extents import Extents
from sparsify.passes.graph import (
    arguments,
    aten,
    erase_dead,
    is_tensor,
    operand,
    past_copies,
    same,
    shape_of,
)
from sparsify.passes.sites import linear_site
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_KERNELS: dict[Any, tuple[str, ...]] = {
    ops.sparse_linear.overload: ("x", "residual"),
    ops.fused_norm.overload: ("x",),
    ops.rotary.overload: ("x", "cos", "sin"),
    ops.gate.overload: ("x",),
    ops.gated.overload: ("x",),
    ops.fused_attention.overload: ("query", "key", "value"),
    ops.block_attention.overload: ("query", "key", "value"),
    ops.paged_attention.overload: ("query",),
    ops.select_blocks.overload: ("query",),
    ops.kv_append.overload: ("key", "value"),
}
"""Operators whose kernels work in lanes, and which of their operands are activations."""

_EXTENTS: dict[Any, tuple[tuple[str, int], ...]] = {
    ops.fused_attention.overload: (("query", 0), ("query", 1), ("key", 1)),
    ops.block_attention.overload: (("query", 0), ("query", 1), ("key", 1)),
    ops.paged_attention.overload: (("query", 0), ("query", 1)),
    ops.select_blocks.overload: (("query", 0), ("query", 1)),
    ops.kv_append.overload: (("key", 0), ("key", 1)),
}
"""Operators that are told their row-major extents; all others have a flag ``lanes``."""

_WITHOUT_TOKENS = (ops.kv_append.overload, ops.select_blocks.overload)
"""Operators that read lanes and whose results have no tokens, so that none are in lanes."""

_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


@dataclass(frozen=True)
class PropagateLanes(GraphPass):
    """Operators with kernels of their own run in lanes, and what lies between them.

    Before::

        x [b, s, f] -> sparse_linear -> mul(., scale [f]) -> fused_norm -> y [b, s, f]

    After::

        x -> to_lanes [ceil(b*s/16), f, 16] -> sparse_linear(lanes=True) -> mul(., scale [f, 1])
          -> fused_norm(lanes=True) -> from_lanes(., [b, s]) -> y [b, s, f]

    A value is converted at most once each way. Elementwise operators move into lanes where that
    saves a conversion; views that only regroup tokens vanish there. An operator on few tokens stays
    row-major, where it has no lanes without a token to compute: a decode step has no lanes at all.
    Lanes past the last token may hold anything after such operators: nothing reads across lanes,
    and ``from_lanes`` drops them.
    Specialising: run it after `SelectLayout`.
    """

    name = "propagate_lanes"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        return _Propagation(rewriter).run()


class _Propagation:
    """One walk over the graph in order, then the removal of the row-major originals.

    Attributes:
        lanes: a value's form in lanes, keyed by the value before views and copies.
        computed: the values that are computed in lanes; the others were converted.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.extents = Extents(rewriter)
        self.lanes: dict[fx.Node, fx.Node] = {}
        self.computed: list[fx.Node] = []
        self.vectors: dict[fx.Node, fx.Node] = {}
        self.decisions: list[Decision] = []
        self.candidates: dict[fx.Node, Elementwise] = {}
        self.wants: set[fx.Node] = set()

    def run(self) -> list[Decision]:
        nodes = self.rewriter.nodes
        for node in reversed(nodes):
            self._note_wish(node)
        for node in nodes:
            if self._is_kernel(node):
                self._move_kernel(node)
            elif node in self.candidates and self._pays(self.candidates[node]):
                self._move_elementwise(self.candidates[node])
        for node in reversed(self.computed):
            self._leave_lanes(node)
        return self.decisions

    def _is_kernel(self, node: fx.Node) -> bool:
        """Whether a node runs in lanes."""
        if node.target not in _KERNELS or not self._fits(node):
            return False
        first = arguments(node)[_KERNELS[node.target][0]]
        return form_of(expected_tokens(first.meta["val"])) == "lanes"

    def _fits(self, node: fx.Node) -> bool:
        """Whether the token extents can be had without the row-major tensor itself."""
        tensors = [o for o in node.all_input_nodes if is_tensor(o) and o in self.wants]
        if node.target in _WITHOUT_TOKENS:
            options = arguments(node)
            tensors += [options[name] for name in _KERNELS[node.target]]
        else:
            tensors.append(node)
        return all(self.extents.covers(e) for t in tensors for e in shape_of(t)[:-1])

    def _note_wish(self, node: fx.Node) -> None:
        """Marks the values that a kernel, or something on the way to one, reads in lanes."""
        if node.op != "call_function":
            return
        if node.target in _KERNELS:
            if not self._is_kernel(node):
                return
            options = arguments(node)
            read = (options[name] for name in _KERNELS[node.target])
            self.wants.update(value for value in read if value is not None)
            return
        found = elementwise(node)
        if found is not None and self._fits(node):
            self.candidates[node] = found
        if node in self.wants:
            if found is not None:
                self.wants.update(found.activations)
            elif _root(node) is not node:
                self.wants.add(operand(node))

    def _pays(self, call: Elementwise) -> bool:
        """Whether running in lanes takes no more conversions, given where the operands are."""
        operands = [_root(a) for a in dict.fromkeys(call.activations)]
        known = [o for o in operands if o in self.lanes]
        if not known:
            return False
        wanted = call.node in self.wants
        entering = len(operands) - len(known)
        leaving = sum(o in self.computed and not self._leaves(o, call.node) for o in known)
        in_lanes = entering + self._leaves(call.node)
        in_rows = leaving + wanted
        return in_lanes < in_rows or (in_lanes == in_rows and wanted)

    def _leaves(self, node: fx.Node, besides: fx.Node | None = None) -> bool:
        """Whether something reads the row-major form of a value."""
        return any(
            self._leaves(user, besides) if _root(user) is not user else self._reads_rows(node, user)
            for user in node.users
            if user is not besides
        )

    def _reads_rows(self, node: fx.Node, user: fx.Node) -> bool:
        if self._is_kernel(user):
            options = arguments(user)
            return all(options[n] is not node for n in _KERNELS[user.target])
        return user not in self.candidates or user not in self.wants

    def _move_kernel(self, node: fx.Node) -> None:
        options = arguments(node)
        names = _KERNELS[node.target]
        dims = _EXTENTS.get(node.target)
        extents = None if dims is None else [shape_of(options[name])[d] for name, d in dims]
        with self.rewriter.graph.inserting_before(node):
            for name in names:
                if options[name] is not None:
                    options[name] = self._in_lanes(options[name], node)
            if extents is None:
                options["lanes"] = True
            else:
                options["extents"] = [self.extents.node(e) for e in extents]
            if node.target in _WITHOUT_TOKENS:
                # One of them writes, so it must stay one node.
                node.args, node.kwargs = tuple(options.values()), {}
                return
            self._record(node, self.rewriter.call(node.target, tuple(options.values())))

    def _move_elementwise(self, call: Elementwise) -> None:
        node = call.node
        with self.rewriter.graph.inserting_before(node):
            moved = {a: self._in_lanes(a, node) for a in call.activations}
            moved |= {v: self._as_column(v) for v in call.vectors}
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: moved.get(n, n))
            new = self.rewriter.graph.create_node("call_function", node.target, args, kwargs)
            new.meta["val"] = self.rewriter.evaluate(ops.to_lanes.overload, (node,), {})
        self._record(node, new)

    def _record(self, node: fx.Node, new: fx.Node) -> None:
        self.lanes[node] = new
        self.computed.append(node)

    def _in_lanes(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        root = _root(node)
        if root not in self.lanes:
            self.lanes[root] = self.rewriter.call(ops.to_lanes.overload, (root,))
            reason = f"{_source(root)} is row-major; {self._title(reader)} reads it in lanes"
            self.decisions.append(
                Decision(root.name, "to_lanes", "rewritten", reason, PropagateLanes.name)
            )
        return self.lanes[root]

    def _as_column(self, vector: fx.Node) -> fx.Node:
        """``[features]`` -> ``[features, 1]``, which broadcasts over lanes."""
        if vector not in self.vectors:
            features = shape_of(vector)[-1]
            column = self.rewriter.call(aten.reshape.default, (vector, [features, 1]))
            self.vectors[vector] = column
        return self.vectors[vector]

    def _leave_lanes(self, node: fx.Node) -> None:
        """Gives the remaining row-major readers a conversion; drops the original computation."""
        if node.users:
            lanes = self.lanes[node]
            leading = [self.extents.node(e) for e in shape_of(node)[:-1]]
            readers = dict.fromkeys(_source(user) for user in node.users)
            with self.rewriter.graph.inserting_after(lanes):
                rows = self.rewriter.call(ops.from_lanes.overload, (lanes, leading))
            self.rewriter.replace(node, rows)
            reason = f"{self._title(lanes)} is in lanes; read row-major by {', '.join(readers)}"
            self.decisions.append(
                Decision(rows.name, "from_lanes", "rewritten", reason, PropagateLanes.name)
            )
        erase_dead(self.rewriter, node)

    def _title(self, node: fx.Node) -> str:
        if node.target == ops.sparse_linear.overload:
            return linear_site(self.rewriter, node).name
        return _source(node)


def _root(node: fx.Node) -> fx.Node:
    """The value that ``node`` holds, before copies and views that only regroup its tokens."""
    while True:
        source = past_copies(node)
        if source.target in _VIEWS and is_tensor(source):
            before, after = shape_of(operand(source)), shape_of(source)
            if before and after and same(before[-1], after[-1]):
                node = operand(source)
                continue
        return source


def _source(node: fx.Node) -> str:
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"the input {node.name}"
    return f"{node.name} ({node.target})"
