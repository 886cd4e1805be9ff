"""Mixtures of experts: which experts a token goes to, and what they make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.codegen.experts import ExpertsCall, all_expert_kernels, expert_kernels
from sparsify.codegen.kernels.cpu.route import Route, rule_of
from sparsify.codegen.operators.arguments import arguments_of, flat, shape_of
from sparsify.layouts import parse
from sparsify.ops import ExpertsShape
from sparsify.routers import parse as parse_router

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_route(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    logits = lowering.tensor(a["logits"])
    kernel = Route(lowering.target.isa, a["router"], int(shape_of(logits)[1]))
    parameters = [lowering.tensor(p) for p in a["parameters"]]
    types = [lowering.type_of(value) for value in node.meta["val"]]
    return lowering.call_for(kernel, [logits, *parameters], types)


def convert_experts(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, experts, weights = (lowering.tensor(a[name]) for name in ("x", "experts", "weights"))
    *leading, _ = shape_of(x)
    call = call_of(node)
    packed = [[lowering.tensor(w) for w in a[name]] for name in ("up", "down", "bias")]
    kernels = expert_kernels(call.up.layout)
    y = kernels.emit(lowering, call, flat(lowering, x), experts, weights, *packed)
    return lowering.reshape(y, (*leading, call.shape.out_features))


def call_of(node: fx.Node) -> ExpertsCall:
    """What is static about a call of ``experts``."""
    a = arguments_of(node)
    names = ("count", "out_features", "hidden", "in_features", "gated")
    shape = ExpertsShape(*(a[name] for name in names))
    return ExpertsCall(
        shape,
        shape.up(parse(a["up_layout"])),
        shape.down(parse(a["down_layout"])),
        a["activation"],
        bool(a["bias"]),
        int(a["experts"].meta["val"].shape[1]),
    )


def refuse_route(node: fx.Node) -> str | None:
    a = arguments_of(node)
    if not isinstance(a["logits"].meta["val"].shape[1], int):
        return "the number of logits is not known when the program is compiled"
    router = parse_router(a["router"])
    return None if rule_of(router) else f"router {router.spec} has no kernel, only its reference"


def refuse_experts(node: fx.Node) -> str | None:
    a = arguments_of(node)
    if not isinstance(a["experts"].meta["val"].shape[1], int):
        return "the number of experts of a token is not known when the program is compiled"
    kinds = [parse(a[name]).name for name in ("up_layout", "down_layout")]
    if kinds[0] not in all_expert_kernels():
        return f"experts in layout {kinds[0]} have no kernels"
    if kinds[0] != kinds[1]:
        return f"projections of experts in two layouts, {kinds[0]} and {kinds[1]}, have no kernels"
    return None
