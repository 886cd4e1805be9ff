"""Operators of the portable and the specialised program; importing the package registers them."""

from sparsify.ops.attention import block_attention, fused_attention
from sparsify.ops.block_selection import DENSITY_STEPS, select_blocks
from sparsify.ops.gated import gated
from sparsify.ops.kv_cache import PAGE, CacheShape, kv_append, paged_attention
from sparsify.ops.lanes import expected_tokens, from_lanes, to_lanes
from sparsify.ops.library import OPERATORS, Operator
from sparsify.ops.linear import ACTIVATIONS, sparse_linear
from sparsify.ops.norm import fused_norm
from sparsify.ops.page_selection import page_bounds, select_pages
from sparsify.ops.rotary import rotary

__all__ = [
    "ACTIVATIONS",
    "DENSITY_STEPS",
    "OPERATORS",
    "PAGE",
    "CacheShape",
    "Operator",
    "block_attention",
    "expected_tokens",
    "from_lanes",
    "fused_attention",
    "fused_norm",
    "gated",
    "kv_append",
    "page_bounds",
    "paged_attention",
    "rotary",
    "select_blocks",
    "select_pages",
    "sparse_linear",
    "to_lanes",
]
