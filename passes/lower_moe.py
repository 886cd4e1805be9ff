"""Routers and experts as exporters spell them out become the operators of mixtures."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import arguments, aten, erase_dead, past_copies, shape_of
from sparsify.passes.moe_patterns import ExpertsMatch, match_experts, part_of
from sparsify.passes.moe_routers import RouterCode
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

    Any code between logits and experts that gives what one of our routers gives becomes that router
    (see `RouterCode`). No token is dropped and none padded. Run it first: other passes change what
    it looks for.
    """

    name = "lower_moe"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            found = match_experts(node)
            if found is not None:
                yield self._experts(rewriter, found)
        for node in rewriter.nodes:
            if node.target == ops.experts.overload:
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
        """What chooses the experts of a call."""
        options = arguments(node)
        chosen, weights = options["experts"], options["weights"]
        if _is_routed(chosen):
            return
        code = RouterCode.of(rewriter, chosen, weights)
        found = None if code is None else code.router(options["count"])
        if code is None or found is None:
            reason = "computed as it is written: no router of ours gives the same"
            yield Decision(chosen.name, "router", "skipped", reason, self.name)
            return
        router, parameters = found
        site = named_weight(rewriter, options["up"][0])[0]
        with rewriter.graph.inserting_before(node):
            stored = [
                rewriter.add_weight(f"{site}:{router.spec}.{name}", tensor)
                for name, tensor in zip(router.parameters, parameters, strict=True)
            ]
            call = rewriter.call(ops.route.overload, (code.logits, router.spec, stored))
            routes = [_part(rewriter, call, index) for index in (0, 1)]
        node.args = (options["x"], *routes, *node.args[3:])
        for old in (chosen, weights):
            erase_dead(rewriter, old)
        reason = f"one call of {router.spec}"
        yield Decision(call.name, "router", "rewritten", reason, self.name)


def _part(rewriter: Rewriter, call: fx.Node, index: int) -> fx.Node:
    part = rewriter.graph.call_function(operator.getitem, (call, index))
    part.meta["val"] = call.meta["val"][index]
    return part


def _is_routed(experts: fx.Node) -> bool:
    call = part_of(past_copies(experts), 0)
    return call is not None and call.target == ops.route.overload


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
