"""Layer normalisation that is spelled out by means and roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify.passes.graph import arguments, aten, past_copies, shape_of
from sparsify.passes.recompose_activation import plus
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class _Scaled:
    x: fx.Node
    epsilon: float
    weight: Any


def layer_norm(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dim."""
    if node.target != aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    for scaled, bias in (node.args[:2], node.args[1::-1]):
        found = _scaled(rewriter, past_copies(scaled))
        if found is None or not _is_vector(rewriter, bias, found.x):
            continue
        size = [int(shape_of(bias)[0])]
        operands = (found.x, size, found.weight, bias, found.epsilon)
        return rewriter.call(aten.layer_norm.default, operands)
    return None


def _scaled(rewriter: Rewriter, node: Any) -> _Scaled | None:
    if not isinstance(node, fx.Node) or node.target != aten.mul.Tensor:
        return None
    for normal, weight in (node.args[:2], node.args[1::-1]):
        found = _normal(past_copies(normal))
        if found is not None and _is_vector(rewriter, weight, found[0]):
            return _Scaled(*found, weight)
    return None


def _normal(node: Any) -> tuple[fx.Node, float] | None:
    """``(x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps)`` -> x, eps."""
    if not isinstance(node, fx.Node):
        return None
    if node.target == aten.div.Tensor:
        centred, root = map(past_copies, node.args[:2])
        if not isinstance(root, fx.Node) or root.target != aten.sqrt.default:
            return None
    elif node.target == aten.mul.Tensor:
        centred, root = map(past_copies, node.args[:2])
        if not isinstance(root, fx.Node) or root.target != aten.rsqrt.default:
            return None
    else:
        return None
    x = _centred(centred)
    shifted = plus(past_copies(root.args[0]))
    if x is None or shifted is None:
        return None
    square = _mean_of(shifted[0])
    squared = None if square is None else _squared(square)
    return (x, shifted[1]) if squared is not None and _centred(squared) is x else None


def _centred(node: Any) -> fx.Node | None:
    """``x - mean(x)`` -> x."""
    if not isinstance(node, fx.Node) or node.target != aten.sub.Tensor:
        return None
    x, mean = map(past_copies, node.args[:2])
    return x if isinstance(mean, fx.Node) and _mean_of(mean) is x else None


def _squared(node: fx.Node) -> fx.Node | None:
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        return past_copies(node.args[0])
    if node.target == aten.mul.Tensor and node.args[0] is node.args[1]:
        return past_copies(node.args[0])
    return None


def _mean_of(node: fx.Node) -> fx.Node | None:
    """``mean(x, -1, keepdim=True)`` -> x."""
    if node.target != aten.mean.dim:
        return None
    options = arguments(node)
    rank = len(shape_of(options["self"]))
    last = [d % rank for d in options["dim"] or ()] == [rank - 1]
    return past_copies(options["self"]) if last and options["keepdim"] else None


def _is_vector(rewriter: Rewriter, node: Any, x: fx.Node) -> bool:
    constant = isinstance(node, fx.Node) and rewriter.weight_of(node) is not None
    return constant and shape_of(node) == shape_of(x)[-1:]
