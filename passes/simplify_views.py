"""Views that undo each other go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.effects import is_written
from sparsify.passes.graph import aten, operand, same_shape, shape_of
from sparsify.passes.heads import reshape
from sparsify.passes.strided import is_view, let_views_copy, strided
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_REORDERED = (aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class SimplifyViews(GraphPass):
    """A chain of views that ends in the order in which it began is a reshape, or nothing.

    Before::

        v [b, s, h*d] -> view [b, s, h, d] -> permute [b, h, s, d] -> permute -> view [b, s, h*d]

    After::

        v [b, s, h*d]

    A chain without a permutation only goes when it also ends in the shape in which it began. What
    is changed in place keeps its views, because some may be copies.
    """

    name = "simplify_views"

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if not is_view(node) or not node.users:
                continue
            view = strided(node)
            if view.base is node or not view.is_whole or is_written(view.base):
                continue
            back = same_shape(shape_of(node), shape_of(view.base))
            if back or any(step.target in _REORDERED for step in _chain(node, view.base)):
                let_views_copy(node, view.base)
                with rewriter.graph.inserting_before(node):
                    rewriter.replace(node, reshape(rewriter, view.base, shape_of(node)))
                shape = ", ".join(map(str, shape_of(node)))
                reason = f"reads {view.base.name} as [{shape}], in its own order"
                yield Decision(node.name, "view", "rewritten", reason, self.name)


def _chain(node: fx.Node, base: fx.Node) -> Iterable[fx.Node]:
    """The views from ``node`` back to what they read."""
    while node is not base:
        yield node
        node = operand(node)
