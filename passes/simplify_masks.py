"""Attention masks: what mask builders compute becomes what attention needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import arguments, aten, same, same_shape, shape_of
from sparsify.passes.iota import AND, NOT, OR, Iota, Scalar, constant, iota, is_bool
from sparsify.passes.positions import Region, region
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_SDPA = aten.scaled_dot_product_attention.default
_ELEMENTWISE = (
    *AND,
    *OR,
    *NOT,
    aten._to_copy.default,
    aten.where.self,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    *(
        getattr(getattr(aten, n), o)
        for n in ("eq", "ne", "le", "lt", "ge", "gt")
        for o in ("Tensor", "Scalar")
    ),
)


@dataclass(frozen=True)
class SimplifyMasks(GraphPass):
    """Masks are reduced to a key mask, to causality, or to nothing.

    Before (Hugging Face, ``b`` sequences of ``s`` tokens)::

        mask [b, s] -> index by arange(b), arange(s) -> [b, 1, 1, s] -+
        full(True) [] -+-> and [1, 1, s, 1] --------------------------+-> and [b, 1, s, s]
        arange(s) >= 0 +                                                    -> expand -> sdpa

    After::

        mask [b, s] -> unsqueeze, unsqueeze [b, 1, 1, s] -> sdpa

    Indexing a whole dim by its arange is a view. A comparison that always holds is True and
    leaves conjunctions. Expansion over queries goes, because attention broadcasts its mask.
    ``key <= query`` becomes ``is_causal``; a mask that is True everywhere goes.
    """

    name: ClassVar[str] = "simplify_masks"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node.target == aten.index.Tensor:
                decision = self._index(rewriter, node)
                if decision is not None:
                    yield decision
        thin = _Thin(rewriter)
        for node in rewriter.nodes:
            if node.target == _SDPA:
                decision = self._attention(rewriter, thin, node)
                if decision is not None:
                    yield decision
            elif node.target == aten.add.Tensor:
                thin.operands(node)

    def _index(self, rewriter: Rewriter, node: fx.Node) -> Decision | None:
        """``x[arange, arange]`` over whole dims is x with its dims placed anew."""
        source, indices = node.args
        ramps = [iota(rewriter, index) for index in indices]
        if not any(ramps):
            return None
        reason = _not_a_view(source, indices, ramps, node)
        if reason is not None:
            return Decision(_site(node), "index", "skipped", reason, self.name)
        count = len(indices)
        rank = max(i.meta["val"].dim() for i in indices)
        places = [rank + r.dim for r in ramps if r is not None]
        order = sorted(range(count), key=places.__getitem__)
        with rewriter.graph.inserting_before(node):
            view = source
            if order != list(range(count)):
                rest = range(count, source.meta["val"].dim())
                view = rewriter.call(aten.permute.default, (view, [*order, *rest]))
            for place in range(rank):
                if place not in places:
                    view = rewriter.call(aten.unsqueeze.default, (view, place))
        rewriter.replace(node, view)
        reason = "indices are the whole range of each dim, so the result is a view"
        return Decision(_site(node), "index", "rewritten", reason, self.name)

    def _attention(self, rewriter: Rewriter, thin: _Thin, node: fx.Node) -> Decision | None:
        options = arguments(node)
        mask = options["attn_mask"]
        if mask is None:
            return None
        before = "x".join(map(str, shape_of(mask)))
        reduced = thin(mask)
        causal = options["is_causal"]
        if not isinstance(reduced, fx.Node):
            if reduced is not True and (isinstance(reduced, bool) or reduced != 0):
                return self._skip(node, f"the mask is {reduced} everywhere")
            reduced, reason = None, "the mask hides nothing and is dropped"
        elif region(rewriter, reduced) == Region(low=0):
            reduced, causal, reason = None, True, "the mask is key <= query: is_causal"
        elif reduced is mask:
            return None
        else:
            after = "x".join(map(str, shape_of(reduced)))
            reason = f"mask {before} reduced to {after}, which attention broadcasts"
        args = (*node.args[:3], reduced, options["dropout_p"], causal)
        with rewriter.graph.inserting_before(node):
            kwargs = {k: options[k] for k in ("scale", "enable_gqa")}
            new = rewriter.call(_SDPA, args, kwargs)
            new.meta = {**node.meta, "val": new.meta["val"]}
        rewriter.replace(node, new)
        rewriter.graph.erase_node(node)
        return Decision(_site(new), "attention", "rewritten", reason, self.name)

    def _skip(self, node: fx.Node, reason: str) -> Decision:
        return Decision(_site(node), "attention", "skipped", reason, self.name)


class _Thin:
    """The smallest tensor that broadcasts to a node's value: expansions undone, True dropped."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.known: dict[fx.Node, fx.Node | Scalar] = {}

    def __call__(self, node: fx.Node) -> fx.Node | Scalar:
        if node not in self.known:
            value = constant(self.rewriter, node)
            self.known[node] = self._reduce(node) if value is None else value
        return self.known[node]

    def operands(self, node: fx.Node) -> None:
        """Lets an addition read the thin form of its operands, where its shape stays the same."""
        if node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return
        for position, operand in enumerate(node.args):
            if operand.target not in (aten.expand.default, aten.where.self):
                continue
            thin = self(operand)
            other = node.args[1 - position]
            if isinstance(thin, fx.Node) and same_shape(shape_of(other), shape_of(node)):
                node.update_arg(position, thin)

    def _reduce(self, node: fx.Node) -> fx.Node | Scalar:
        if node.op != "call_function":
            return node
        if node.target == aten.expand.default:
            return self._of_rank(self(node.args[0]), node)
        if node.target not in _ELEMENTWISE:
            return node
        if node.target in AND and is_bool(node) and not node.kwargs:
            left, right = (self(a) for a in node.args)
            for one, other in ((left, right), (right, left)):
                if one is True:
                    return self._of_rank(other, node)
        args = tuple(self._operand(a) for a in node.args)
        if args == node.args:
            return node
        with self.rewriter.graph.inserting_before(node):
            new = self.rewriter.call(node.target, args, dict(node.kwargs))
        if same_shape(shape_of(new), shape_of(node)):
            self.rewriter.replace(node, new)
        return self._of_rank(new, node)

    def _operand(self, operand: Any) -> Any:
        if not isinstance(operand, fx.Node) or not isinstance(
            operand.meta.get("val"), torch.Tensor
        ):
            return operand
        thin = self(operand)
        return thin if isinstance(thin, fx.Node) else operand

    def _of_rank(self, thin: fx.Node | Scalar, node: fx.Node) -> fx.Node | Scalar:
        if isinstance(thin, fx.Node):
            with self.rewriter.graph.inserting_before(node):
                for _ in range(node.meta["val"].dim() - thin.meta["val"].dim()):
                    thin = self.rewriter.call(aten.unsqueeze.default, (thin, 0))
        return thin


def _not_a_view(
    source: fx.Node, indices: list[Any], ramps: list[Iota | None], node: fx.Node
) -> str | None:
    if None in indices or None in ramps:
        return "some dims are indexed by an arange, others are not"
    rank = max(i.meta["val"].dim() for i in indices)
    found = [r for r in ramps if r is not None]
    if len({r.dim for r in found}) != len(found):
        return "two indices run along the same dim: this reads a diagonal"
    for ramp, size in zip(found, shape_of(source), strict=False):
        if ramp.offset:
            return f"the index starts at {ramp.offset}, not at 0"
        if not same(ramp.length, size):
            return f"an index of length {ramp.length} does not cover its dim of size {size}"
    inner = shape_of(node)[:rank]
    taken = {rank + r.dim for r in found}
    if not all(same(size, 1) for place, size in enumerate(inner) if place not in taken):
        return "the indices are expanded, so elements are read more than once"
    return None


def _site(node: fx.Node) -> str:
    """The path of the module that computed a node, or its name."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    return str(path or node.name)
