"""Operators that compute each element alone: activations, and what can run in lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify.passes.graph import arguments, aten, is_tensor, same, same_shape, shape_of
from sparsify.rewriter import Rewriter

_TARGETS = frozenset(
    {
        aten.abs.default,
        aten.add.Scalar,
        aten.add.Tensor,
        aten.clamp.default,
        aten.clamp_max.default,
        aten.clamp_min.default,
        aten.div.Scalar,
        aten.div.Tensor,
        aten.elu.default,
        aten.erf.default,
        aten.exp.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.reciprocal.default,
        aten.relu.default,
        aten.rsqrt.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.sqrt.default,
        aten.sub.Scalar,
        aten.sub.Tensor,
        aten.tanh.default,
    }
)
_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_of(node: fx.Node | None) -> str | None:
    """The name in `sparsify.ops.ACTIVATIONS` of what a node computes, None when it has none."""
    if node is None:
        return None
    if node.target == aten.gelu.default:
        return _GELUS.get(arguments(node)["approximate"])
    return _ACTIVATIONS.get(node.target)


def activate(rewriter: Rewriter, x: fx.Node, activation: str) -> fx.Node:
    """Inserts the operator that `activation_of` calls so; ``x`` itself for ``none``."""
    if activation == "none":
        return x
    for approximation, name in _GELUS.items():
        if name == activation:
            return rewriter.call(aten.gelu.default, (x,), {"approximate": approximation})
    (target,) = (t for t, name in _ACTIVATIONS.items() if name == activation)
    return rewriter.call(target, (x,))


@dataclass(frozen=True)
class Elementwise:
    """An elementwise call: ``activations`` have the result's shape, ``vectors`` ``[features]``."""

    node: fx.Node
    activations: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]


def elementwise(node: fx.Node) -> Elementwise | None:
    """The operands of a call that may run in lanes; None when it may not.

    Numbers and zero-dimensional tensors need no change. An operand that broadcasts over features
    or over some of the tokens has no cheap form in lanes.
    """
    if node.target not in _TARGETS or not is_tensor(node):
        return None
    shape, dtype = shape_of(node), node.meta["val"].dtype
    if dtype != torch.float32 or not shape or not isinstance(shape[-1], int):
        return None
    activations: list[fx.Node] = []
    vectors: list[fx.Node] = []
    for operand in arguments(node).values():
        if not isinstance(operand, fx.Node):
            continue
        if not is_tensor(operand) or operand.meta["val"].dtype != dtype:
            return None
        own = shape_of(operand)
        if same_shape(own, shape):
            activations.append(operand)
        elif _is_vector(own, shape[-1]):
            vectors.append(operand)
        elif own:
            return None
    return Elementwise(node, tuple(activations), tuple(vectors)) if activations else None


def _is_vector(shape: tuple[Any, ...], features: int) -> bool:
    return bool(shape) and shape[-1] == features and all(same(e, 1) for e in shape[:-1])
