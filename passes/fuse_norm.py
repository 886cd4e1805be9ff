"""Normalisations over features become one operator that can run in lanes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import (
    arguments,
    aten,
    is_tensor,
    operand,
    past_copies,
    same_shape,
    shape_of,
)
from sparsify.passes.sites import site_name
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class FuseNorm(GraphPass):
    """Layer and root-mean-square normalisation over the last dimension become ``fused_norm``.

    Before::

        layer_norm(x, [features], weight, bias, eps) | rms_norm(x, [features], weight, eps)
        | weight * (x * rsqrt(mean(x ** 2, -1) + eps))

    After::

        fused_norm(x, weight, bias, eps, "layer" | "rms")

    A transposition before it that leaves the features last comes after it instead, where passes
    that look for the split into heads expect it.
    """

    name = "fuse_norm"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            found = _norm(node)
            if found is None:
                continue
            site = site_name(rewriter.weight_name(found.weight) or node.name)
            operator = f"{found.kind}_norm"
            reason = _misfit(node, found)
            if reason is not None:
                yield Decision(site, operator, "skipped", reason, self.name)
                continue
            x = past_copies(found.x)
            turned = _keeps_features(x)
            source = operand(x) if turned else found.x
            with rewriter.graph.inserting_before(node):
                call = rewriter.call(
                    ops.fused_norm.overload,
                    (source, found.weight, found.bias, found.epsilon, found.kind),
                )
                if turned:
                    call = rewriter.call(x.target, (call, *x.args[1:]))
            rewriter.replace(node, call)
            reason = f"normalises {shape_of(node)[-1]} features in one kernel"
            yield Decision(site, operator, "rewritten", reason, self.name)


def _keeps_features(node: fx.Node) -> bool:
    """Whether a node is a transposition that leaves the last dimension in its place."""
    rank = len(shape_of(node))
    if node.target == aten.permute.default:
        return operand(node, 1)[-1] % rank == rank - 1
    if node.target == aten.transpose.int:
        return rank - 1 not in (operand(node, 1) % rank, operand(node, 2) % rank)
    return False


@dataclass(frozen=True)
class _Norm:
    x: fx.Node
    dims: int
    weight: fx.Node | None
    bias: fx.Node | None
    epsilon: float
    kind: str


def _misfit(node: fx.Node, norm: _Norm) -> str | None:
    if norm.dims != 1:
        return f"normalises over {norm.dims} dimensions, not over the last alone"
    features = shape_of(norm.x)[-1]
    for vector in (norm.weight, norm.bias):
        if vector is not None and shape_of(vector) != (features,):
            return f"the weight has shape {shape_of(vector)}, not [{features}]"
    dtype = node.meta["val"].dtype
    return None if dtype == torch.float32 else f"activations are {dtype}, not float32"


def _norm(node: fx.Node) -> _Norm | None:
    if node.op != "call_function" or not is_tensor(node):
        return None
    if node.target == aten.layer_norm.default:
        o = arguments(node)
        dims = len(o["normalized_shape"])
        return _Norm(o["input"], dims, o["weight"], o["bias"], o["eps"], "layer")
    if node.target == aten.rms_norm.default:
        o = arguments(node)
        epsilon = torch.finfo(node.meta["val"].dtype).eps if o["eps"] is None else o["eps"]
        return _Norm(o["input"], len(o["normalized_shape"]), o["weight"], None, epsilon, "rms")
    return _weighted_rms(node)


def _weighted_rms(node: fx.Node) -> _Norm | None:
    """``weight * (x * rsqrt(mean(x ** 2) + eps))``, in either order of each product."""
    for weight, scaled in _orders(node, aten.mul.Tensor):
        if len(shape_of(weight)) != 1 or not same_shape(shape_of(scaled), shape_of(node)):
            continue
        for x, root in _orders(_past_casts(scaled), aten.mul.Tensor):
            found = _mean_square(root)
            if found is not None and found[0] is _past_casts(x):
                return _Norm(found[0], 1, weight, None, found[1], "rms")
    return None


def _mean_square(root: fx.Node) -> tuple[fx.Node, float] | None:
    """``rsqrt(mean(x ** 2, -1, keepdim=True) + eps)`` -> x, eps."""
    if root.target != aten.rsqrt.default:
        return None
    shifted: Any = root.args[0]
    if shifted.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    mean, epsilon = operand(shifted), operand(shifted, 1)
    if not isinstance(epsilon, (int, float)) or mean.target != aten.mean.dim:
        return None
    options = arguments(mean)
    square = options["self"]
    rank = len(shape_of(square))
    if [d % rank for d in options["dim"]] != [rank - 1] or not options["keepdim"]:
        return None
    if square.target == aten.pow.Tensor_Scalar and square.args[1] == 2:
        return _past_casts(square.args[0]), float(epsilon)
    if square.target == aten.mul.Tensor and square.args[0] is square.args[1]:
        return _past_casts(square.args[0]), float(epsilon)
    return None


def _orders(node: Any, target: Any) -> Iterable[tuple[fx.Node, fx.Node]]:
    """The operands of a call of ``target``, which commutes, in both orders; none of other nodes."""
    if isinstance(node, fx.Node) and node.target == target and all(map(is_tensor, node.args[:2])):
        left, right = operand(node), operand(node, 1)
        yield left, right
        yield right, left


def _past_casts(node: fx.Node) -> fx.Node:
    """The value behind copies and casts that keep the dtype."""
    node = past_copies(node)
    casts = (aten._to_copy.default, aten.to.dtype)
    while node.target in casts and node.meta["val"].dtype == operand(node).meta["val"].dtype:
        node = past_copies(operand(node))
    return node
