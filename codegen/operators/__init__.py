"""How each operator becomes calls of kernels, one file an operator family.

`CONVERTERS` has them by the operator's bare name, as TVM's importer looks converters up. Operators
outside lanes are served too, by kernels for rows or by conversions on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.codegen.operators import (
    active,
    aten,
    attention,
    experts,
    lanes,
    linear,
    logarithms,
    pages,
    tokens,
)

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering

Converter = Callable[[fx.Node, "Lowering"], Any]

CONVERTERS: dict[str, Converter] = {
    "to_lanes.default": lanes.convert_to_lanes,
    "from_lanes.default": lanes.convert_from_lanes,
    "sparse_linear.default": linear.convert_sparse_linear,
    "active_linear.default": active.convert_active_linear,
    "gated_linear.default": active.convert_gated_linear,
    "fused_norm.default": tokens.convert_fused_norm,
    "rotary.default": tokens.convert_rotary,
    "gate.default": tokens.convert_gate,
    "gated.default": tokens.convert_gated,
    "route.default": experts.convert_route,
    "experts.default": experts.convert_experts,
    "fused_attention.default": attention.convert_fused_attention,
    "block_attention.default": attention.convert_block_attention,
    "list_blocks.default": attention.convert_list_blocks,
    "kv_append.default": attention.convert_kv_append,
    "paged_attention.default": attention.convert_paged_attention,
    "page_bounds.default": pages.convert_page_bounds,
    "select_blocks.default": pages.convert_select_blocks,
    "select_pages.default": pages.convert_select_pages,
    "embedding.default": aten.convert_embedding,
    "index_select.default": aten.convert_index_select,
    "slice.Tensor": aten.convert_slice,
    "scalar_tensor.default": aten.convert_scalar_tensor,
    "select.int": aten.convert_select,
    "amax.default": aten.convert_reduction,
    "amin.default": aten.convert_reduction,
    "prod.dim_int": aten.convert_reduction,
    "softmax.int": aten.convert_softmax,
    "log1p.default": logarithms.convert_log1p,
    "softplus.default": logarithms.convert_softplus,
}

REFUSALS: dict[str, Callable[[fx.Node], str | None]] = {
    "gate.default": tokens.refuse_gate,
    "route.default": experts.refuse_route,
    "experts.default": experts.refuse_experts,
    "paged_attention.default": attention.refuse_paged_attention,
    "select_blocks.default": pages.refuse_select_blocks,
    "select_pages.default": pages.refuse_select_pages,
}
"""Why a call of an operator cannot be compiled, where that depends on the call."""
