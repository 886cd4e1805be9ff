"""Routers and experts as exporters spell them out become the operators of mixtures."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import arguments, aten, erase_dead, shape_of
from sparsify.passes.moe_patterns import ExpertsMatch, match_experts, part_of, viewed
from sparsify.passes.moe_routers import RouterCode
from sparsify.passes.moe_scaled import ScaledMatch, match_scaled, pairs
from sparsify.passes.sites import common_head, named_weight
from sparsify.report import Decision
from sparsify.rewriter import Rewriter
from sparsify.routers import Candidate


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
    (see `RouterCode`). Where all experts see all tokens, times a score that is mostly zero, each
    sees its own alone (see `ScaledMatch`)::

        x -> repeat -> * scores -> bmm Wu -> silu(gate) * up -> bmm Wd -> sum over experts
        ==> experts(x * weight, route(logits), 1, Wu, Wd)

    No token is dropped and none padded. Run it first: other passes change what it looks for.
    """

    name = "lower_moe"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            found = match_experts(node)
            if found is not None:
                yield self._experts(rewriter, found)
            scaled = match_scaled(node)
            if scaled is not None:
                yield from self._scaled(rewriter, scaled)
        for node in rewriter.nodes:
            if node.target == ops.experts.overload:
                yield from self._router(rewriter, node)

    def _experts(self, rewriter: Rewriter, found: ExpertsMatch) -> Decision:
        reason = _misfit(rewriter, found, (found.experts, found.weights))
        if reason is not None:
            return Decision(found.result.name, "experts", "skipped", reason, self.name)
        with rewriter.graph.inserting_before(found.result):
            chosen = rewriter.call(aten._to_copy.default, (found.experts,), {"dtype": torch.int32})
            call = _call(rewriter, found, (found.x, chosen, found.weights), (found.up, found.down))
        rewriter.replace(found.result, call)
        erase_dead(rewriter, found.result)
        return self._grouped(rewriter, found, call)

    def _scaled(self, rewriter: Rewriter, found: ScaledMatch) -> Iterable[Decision]:
        name = found.result.name
        reason = _misfit(rewriter, found, (found.scores,))
        if reason is not None:
            yield Decision(name, "experts", "skipped", reason, self.name)
            return
        code = RouterCode.of(rewriter, found.scores)
        router = None if code is None else code.router(int(shape_of(found.up)[0]))
        if code is None or router is None:
            reason = "every expert sees every token: no router of ours gives these scores"
            yield Decision(name, "experts", "skipped", reason, self.name)
            return
        with rewriter.graph.inserting_before(found.result):
            site = named_weight(rewriter, found.up)[0]
            route, *routes = _route(rewriter, code.logits, router, site)
            operands = pairs(rewriter, found.x, *routes)
            turned = (_turned(rewriter, found.up), _turned(rewriter, found.down))
            call = result = _call(rewriter, found, operands, turned)
            slots, features = shape_of(routes[0])[1], shape_of(call)[1]
            if slots != 1:
                parts = rewriter.call(aten.reshape.default, (call, [-1, slots, features]))
                result = rewriter.call(aten.sum.dim_IntList, (parts, [1]))
        rewriter.replace(found.result, result)
        erase_dead(rewriter, found.result)
        yield self._routed(route, router)
        yield self._grouped(rewriter, found, call)

    def _grouped(
        self, rewriter: Rewriter, found: ExpertsMatch | ScaledMatch, call: fx.Node
    ) -> Decision:
        names = [named_weight(rewriter, w)[0] for w in (found.up, found.down)]
        options = arguments(call)
        sizes = ("count", "out_features", "hidden", "in_features")
        return Decision(
            ".".join(common_head([n.split(".") for n in names])) or call.name,
            "experts",
            "rewritten",
            f"{options['count']} experts run grouped, each on the tokens that are sent to it",
            self.name,
            shape=tuple(int(options[size]) for size in sizes),
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
        site = named_weight(rewriter, options["up"][0])[0]
        with rewriter.graph.inserting_before(node):
            call, *routes = _route(rewriter, code.logits, found, site)
        node.args = (options["x"], *routes, *node.args[3:])
        for old in (chosen, weights):
            erase_dead(rewriter, old)
        yield self._routed(call, found)

    def _routed(self, call: fx.Node, found: Candidate) -> Decision:
        reason = f"one call of {found[0].spec}"
        return Decision(call.name, "router", "rewritten", reason, self.name)


def _route(
    rewriter: Rewriter, logits: fx.Node, found: Candidate, site: str
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """A call of a router, and its results."""
    router, parameters = found
    stored = [
        rewriter.add_weight(f"{site}:{router.spec}.{name}", tensor)
        for name, tensor in zip(router.parameters, parameters, strict=True)
    ]
    call = rewriter.call(ops.route.overload, (logits, router.spec, stored))
    return call, _part(rewriter, call, 0), _part(rewriter, call, 1)


def _call(
    rewriter: Rewriter,
    found: ExpertsMatch | ScaledMatch,
    tokens: tuple[fx.Node, fx.Node, fx.Node],
    weights: tuple[fx.Node, fx.Node],
) -> fx.Node:
    """Experts, on tokens with their experts and weights, of weights ``[count, rows, columns]``."""
    up, down = weights
    count, rows, in_features = shape_of(up)
    out_features, hidden = shape_of(down)[1:]
    shape = (count, out_features, hidden, in_features)
    assert rows == (2 * hidden if found.gated else hidden)
    kind = (found.activation, found.gated)
    return rewriter.call(
        ops.experts.overload, (*tokens, [up], [down], [], "dense", "dense", *shape, *kind)
    )


def _turned(rewriter: Rewriter, weight: fx.Node) -> fx.Node:
    """A weight ``[count, columns, rows]`` as the operator takes it."""
    name, tensor = named_weight(rewriter, weight)
    return rewriter.add_weight(f"{name}:turned", tensor.detach().transpose(1, 2).contiguous())


def _part(rewriter: Rewriter, call: fx.Node, index: int) -> fx.Node:
    part = rewriter.graph.call_function(operator.getitem, (call, index))
    part.meta["val"] = call.meta["val"][index]
    return part


def _is_routed(experts: fx.Node) -> bool:
    call = part_of(viewed(experts), 0)
    return call is not None and call.target == ops.route.overload


def _misfit(
    rewriter: Rewriter, found: ExpertsMatch | ScaledMatch, routes: tuple[fx.Node, ...]
) -> str | None:
    """Why the operator cannot compute these experts."""
    for name, weight in (("up", found.up), ("down", found.down)):
        if rewriter.weight_of(weight) is None:
            return f"the {name} projections are no constant weights"
        if len(shape_of(weight)) != 3:
            return f"the {name} projections have shape {shape_of(weight)}, not one matrix an expert"
    tensors = (
        found.x,
        found.up,
        found.down,
        *(r for r in routes if r.meta["val"].is_floating_point()),
    )
    dtypes = {tensor.meta["val"].dtype for tensor in tensors}
    if dtypes != {torch.float32}:
        return f"operands are {', '.join(sorted(map(str, dtypes)))}; the kernels compute in float32"
    if any(len(shape_of(route)) != 2 for route in routes):
        return "experts or weights of tokens are not in one row for each token"
    return None
