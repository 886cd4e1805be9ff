"""Operators of the portable and the specialised program; importing the package registers them."""

from sparsify.ops.active import active_linear, gated_linear, union_share
from sparsify.ops.attention import block_attention, fused_attention
from sparsify.ops.block_selection import DENSITY_STEPS, select_blocks
from sparsify.ops.chunks import CHUNK_TOKENS, chunk_bounds
from sparsify.ops.experts import ExpertsShape, experts
from sparsify.ops.gate import gate
from sparsify.ops.gated import gated
from sparsify.ops.kv_cache import PAGE, CacheShape, kv_append, paged_attention, seen_blocks
from sparsify.ops.lanes import expected_tokens, from_lanes, to_lanes
from sparsify.ops.library import OPERATORS, Operator
from sparsify.ops.linear import ACTIVATIONS, sparse_linear
from sparsify.ops.list_blocks import list_blocks
from sparsify.ops.norm import fused_norm
from sparsify.ops.page_selection import BOUND_PARTS, page_bounds, select_pages
from sparsify.ops.rotary import rotary
from sparsify.ops.route import route
from sparsify.ops.running_maximum import below_maximum

LINEARS = frozenset(operator.overload for operator in (sparse_linear, active_linear, gated_linear))
"""Operators that multiply by one weight, held in a layout, which they name alike."""

__all__ = [
    "ACTIVATIONS",
    "BOUND_PARTS",
    "CHUNK_TOKENS",
    "DENSITY_STEPS",
    "LINEARS",
    "OPERATORS",
    "PAGE",
    "CacheShape",
    "ExpertsShape",
    "Operator",
    "active_linear",
    "below_maximum",
    "block_attention",
    "chunk_bounds",
    "expected_tokens",
    "experts",
    "from_lanes",
    "fused_attention",
    "fused_norm",
    "gate",
    "gated",
    "gated_linear",
    "kv_append",
    "list_blocks",
    "page_bounds",
    "paged_attention",
    "rotary",
    "route",
    "seen_blocks",
    "select_blocks",
    "select_pages",
    "sparse_linear",
    "to_lanes",
    "union_share",
]
