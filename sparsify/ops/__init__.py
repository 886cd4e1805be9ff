"""Operators of the portable and the specialised program; importing the package registers them."""

from sparsify.ops.attention import fused_attention
from sparsify.ops.experts import ExpertsShape, experts
from sparsify.ops.gated import gated
from sparsify.ops.kv_cache import PAGE, CacheShape, kv_append, paged_attention
from sparsify.ops.lanes import expected_tokens, from_lanes, to_lanes
from sparsify.ops.library import OPERATORS, Operator
from sparsify.ops.linear import ACTIVATIONS, sparse_linear
from sparsify.ops.norm import fused_norm
from sparsify.ops.rotary import rotary
from sparsify.ops.route import route

__all__ = [
    "ACTIVATIONS",
    "OPERATORS",
    "PAGE",
    "CacheShape",
    "ExpertsShape",
    "Operator",
    "expected_tokens",
    "experts",
    "from_lanes",
    "fused_attention",
    "fused_norm",
    "gated",
    "kv_append",
    "paged_attention",
    "rotary",
    "route",
    "sparse_linear",
    "to_lanes",
]
