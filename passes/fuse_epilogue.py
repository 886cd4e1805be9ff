"""Activations and residual additions run inside the linear that precedes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.elementwise import activation_of
from sparsify.passes.graph import (
    arguments,
    aten,
    erase_dead,
    is_tensor,
    past_copies,
    same_shape,
    shape_of,
    sole_user,
)
from sparsify.passes.sites import linear_site
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_LINEAR = ops.sparse_linear.overload


@dataclass(frozen=True)
class FuseEpilogue(GraphPass):
    """``activation(linear) + residual`` becomes one linear.

    Before::

        sparse_linear(x, W, bias) -> gelu | silu | relu | tanh -> add(., residual)

    After::

        sparse_linear(x, W, bias, activation="gelu", residual=residual)

    Either step may be missing. The order is fixed: an activation that follows the addition stays.
    Every fused value must have one user. Run it after `SparseLinear`.
    """

    name = "fuse_epilogue"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node.target == _LINEAR and node.users:
                yield from self._fuse(rewriter, node)

    def _fuse(self, rewriter: Rewriter, node: fx.Node) -> Iterable[Decision]:
        site = linear_site(rewriter, node).name
        options = arguments(node)
        last, done = node, []
        if options["activation"] == "none" and options["residual"] is None:
            user = sole_user(last)
            activation = activation_of(user)
            if user is not None and activation is not None:
                options["activation"] = activation
                last = user
                done.append(activation)
        if options["residual"] is None:
            user = sole_user(last)
            residual = _residual(last, user)
            if isinstance(residual, str):
                yield Decision(site, "epilogue", "skipped", residual, self.name)
            elif user is not None and residual is not None:
                options["residual"] = residual
                last = user
                done.append("the residual addition")
        if not done:
            yield from self._explain(site, node)
            return
        with rewriter.graph.inserting_before(last):
            fused = rewriter.call(_LINEAR, tuple(options.values()))
        rewriter.replace(last, fused)
        erase_dead(rewriter, last)
        reason = f"{' and '.join(done)} computed before the result is stored"
        yield Decision(site, "epilogue", "rewritten", reason, self.name)
        if options["residual"] is not None and activation_of(sole_user(fused)) is not None:
            reason = "an activation follows the residual addition; the kernel adds last"
            yield Decision(site, "epilogue", "skipped", reason, self.name)

    def _explain(self, site: str, node: fx.Node) -> Iterable[Decision]:
        """Why an activation that reads this linear was not fused."""
        readers = [user for user in node.users if activation_of(user) is not None]
        if readers and len(node.users) > 1:
            reason = f"{readers[0].name} cannot be fused: {len(node.users)} nodes read the linear"
            yield Decision(site, "epilogue", "skipped", reason, self.name)


def _residual(value: fx.Node, user: fx.Node | None) -> fx.Node | str | None:
    """The other operand of an addition, or why it is no residual; None when nothing is added."""
    if user is None or user.target != aten.add.Tensor:
        return None
    options = arguments(user)
    operands = [options["self"], options["other"]]
    others = [o for o in operands if past_copies(o) is not value]
    if len(others) != 1:
        return "the linear is added to itself"
    other = others[0]
    if not is_tensor(other):
        return f"adds the number {other}, no residual"
    if options["alpha"] != 1:
        return f"the addition scales an operand by alpha={options['alpha']}"
    if not same_shape(shape_of(other), shape_of(value)):
        return f"the added tensor has shape {_text(other)}, the linear {_text(value)}"
    if other.meta["val"].dtype != value.meta["val"].dtype:
        return f"the added tensor is {other.meta['val'].dtype}"
    return other


def _text(node: fx.Node) -> str:
    return "[" + ", ".join(map(str, shape_of(node))) + "]"
