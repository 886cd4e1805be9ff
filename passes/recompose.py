"""Operators that a file spells out become the composite ones that later passes know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify.contracts import GraphPass, PassContext
from sparsify.passes.graph import arguments, aten, erase_dead, is_tensor, past_copies, shape_of
from sparsify.passes.recompose_activation import activation
from sparsify.passes.recompose_attention import attention
from sparsify.passes.recompose_norm import layer_norm
from sparsify.report import Decision
from sparsify.rewriter import Rewriter


@dataclass(frozen=True)
class Recompose(GraphPass):
    """Sums, products and roots become the layer norm, GELU, attention ... that they compute.

    Before::

        linear(x, W) + bias
        | x * (1 + erf(x / sqrt(2))) * 0.5 | x * sigmoid(x) | x * clamp(x + 3, 0, 6) / 6
        | (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias
        | softmax(q k^T * scale + mask) v

    After::

        linear(x, W, bias) | gelu(x) | silu(x) | hardswish(x) | layer_norm(x, ...) | sdpa(q, k, ...)

    ONNX exporters write these forms. A row of attention whose every key is masked by ``-inf``
    gives zeros, where the spelled-out form gives NaN unless it guards against that.
    """

    name = "recompose"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        for node in rewriter.nodes:
            if node._erased or node.op != "call_function" or not node.users or not is_tensor(node):
                continue
            with rewriter.graph.inserting_before(node):
                made = next(filter(None, (rule(rewriter, node) for rule in _RULES)), None)
            if made is None:
                continue
            operator = _computed(made)._schema.name.split("::")[-1]
            rewriter.replace(node, made)
            erase_dead(rewriter, node)
            reason = "computed by several operators; they become the one"
            yield Decision(made.name, operator, "rewritten", reason, self.name)


def _computed(node: fx.Node) -> Any:
    """The operator of a node, past the reshaping of its result."""
    return _computed(node.args[0]) if node.target == aten.reshape.default else node.target


def _biased(rewriter: Rewriter, node: fx.Node) -> fx.Node | None:
    """``linear(x, W) + bias`` as one linear."""
    if node.target != aten.add.Tensor or arguments(node)["alpha"] != 1:
        return None
    for product, bias in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        product = past_copies(product)
        if not isinstance(product, fx.Node) or product.target != aten.linear.default:
            continue
        options = arguments(product)
        constant = isinstance(bias, fx.Node) and rewriter.weight_of(bias) is not None
        fits = constant and shape_of(bias) == shape_of(product)[-1:]
        if options["bias"] is None and fits and len(product.users) == 1:
            return rewriter.call(product.target, (options["input"], options["weight"], bias))
    return None


_RULES = (_biased, activation, layer_norm, attention)
