"""Operators of the portable and the specialised program; importing the package registers them."""

from sparsify.ops.attention import fused_attention
from sparsify.ops.lanes import from_lanes, to_lanes
from sparsify.ops.library import OPERATORS, Operator
from sparsify.ops.linear import ACTIVATIONS, sparse_linear
from sparsify.ops.norm import fused_norm

__all__ = [
    "ACTIVATIONS",
    "OPERATORS",
    "Operator",
    "from_lanes",
    "fused_attention",
    "fused_norm",
    "sparse_linear",
    "to_lanes",
]
