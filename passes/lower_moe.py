"""Routers and experts as exporters spell them out become the operators of mixtures."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import aten, erase_dead, shape_of
from sparsify.passes.moe_patterns import ExpertsMatch, match_experts, match_router
from sparsify.passes.sites import common_head, named_weight
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class LowerMoe(GraphPass):
    """A mixture of experts runs as route, group, grouped products, weighted sum.

    Before::

        logits -> softmax -> topk -+-> (/ its sum) -----------------------------+
                                   +-> experts e -> Wu[e], Wd[e]                |
        x -> repeat k times -> bmm Wu[e] -> silu(gate) * up -> bmm Wd[e] -> * -> sum over k

    or the same by ``sort``, ``grouped_mm`` and the inverse permutation. After::

        logits -> route("softmax_top_k{k=2,normalise=1}") -+
        x --------------------------------------------- experts(., Wu, Wd)

    No token is dropped and none padded. Run it first: other passes change what it looks for.
    """

    name = "lower_moe"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            found = match_experts(node)
            if found is not None:
                yield self._experts(rewriter, found)
        for node in rewriter.nodes:
            if node.target == aten.topk.default:
                yield from self._router(rewriter, node)

    def _experts(self, rewriter: Rewriter, found: ExpertsMatch) -> Decision:
        reason = _misfit(rewriter, found)
        name = found.result.name
        if reason is not None:
            return Decision(name, "experts", "skipped", reason, self.name)
        count, rows, in_features = shape_of(found.up)
        out_features = shape_of(found.down)[1]
        hidden = rows // 2 if found.gated else rows
        with rewriter.graph.inserting_before(found.result):
            chosen = rewriter.call(aten._to_copy.default, (found.experts,), {"dtype": torch.int32})
            call = rewriter.call(
                ops.experts.overload,
                (
                    found.x, chosen, found.weights, [found.up], [found.down], [], "dense", "dense",
                    count, out_features, hidden, in_features, found.activation, found.gated,
                ),
            )  # fmt: skip
        rewriter.replace(found.result, call)
        erase_dead(rewriter, found.result)
        names = [named_weight(rewriter, w)[0] for w in (found.up, found.down)]
        return Decision(
            ".".join(common_head([n.split(".") for n in names])) or name,
            "experts",
            "rewritten",
            f"{count} experts run grouped, each on the tokens that are sent to it",
            self.name,
            shape=(int(count), int(out_features), int(hidden), int(in_features)),
        )

    def _router(self, rewriter: Rewriter, node: fx.Node) -> Iterable[Decision]:
        """Of tokens' choices among experts; of any other topk nothing is said."""
        found = match_router(node)
        if found is None or not any(map(_is_narrow, found.experts.users)):
            return
        logits = found.logits.meta["val"]
        if logits.dtype != torch.float32 or not isinstance(logits.shape[1], int):
            reason = f"its logits are {logits.dtype} of shape {tuple(logits.shape)}"
            yield Decision(node.name, "router", "skipped", reason, self.name)
            return
        with rewriter.graph.inserting_before(node):
            call = rewriter.call(ops.route.overload, (found.logits, found.spec, []))
            experts, weights = (_part(rewriter, call, index) for index in (0, 1))
        for user in list(found.experts.users):
            if _is_narrow(user):
                rewriter.replace(user, experts)
        if found.experts.users:
            with rewriter.graph.inserting_after(experts):
                wide = rewriter.call(aten._to_copy.default, (experts,), {"dtype": torch.int64})
            rewriter.replace(found.experts, wide)
        rewriter.replace(found.weights, weights)
        reason = f"one call of {found.spec}"
        yield Decision(node.name, "router", "rewritten", reason, self.name)


def _part(rewriter: Rewriter, call: fx.Node, index: int) -> fx.Node:
    part = rewriter.graph.call_function(operator.getitem, (call, index))
    part.meta["val"] = call.meta["val"][index]
    return part


def _is_narrow(node: fx.Node) -> bool:
    """Whether a node is the experts of tokens as the operator takes them."""
    return node.target == aten._to_copy.default and any(
        user.target == ops.experts.overload for user in node.users
    )


def _misfit(rewriter: Rewriter, found: ExpertsMatch) -> str | None:
    """Why the operator cannot compute these experts."""
    for name, weight in (("up", found.up), ("down", found.down)):
        if rewriter.weight_of(weight) is None:
            return f"the {name} projections are no constant weights"
        if len(shape_of(weight)) != 3:
            return f"the {name} projections have shape {shape_of(weight)}, not one matrix an expert"
    tensors = (found.x, found.weights, found.up, found.down)
    dtypes = {tensor.meta["val"].dtype for tensor in tensors}
    if dtypes != {torch.float32}:
        return f"operands are {', '.join(sorted(map(str, dtypes)))}; the kernels compute in float32"
    if len(shape_of(found.experts)) != 2 or len(shape_of(found.weights)) != 2:
        return "experts or weights of tokens are not in one row for each token"
    return None
