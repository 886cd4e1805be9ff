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
    extremes,
    lanes,
    linear,
    logarithms,
    pages,
    pooling,
    reductions,
    remainders,
    resizing,
    sorting,
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
    "maximum.default": extremes.convert_maximum,
    "minimum.default": extremes.convert_minimum,
    "max.other": extremes.convert_maximum,
    "min.other": extremes.convert_minimum,
    "clamp.default": extremes.convert_clamp,
    "clamp.Tensor": extremes.convert_clamp,
    "clamp_min.default": extremes.convert_clamp,
    "clamp_max.default": extremes.convert_clamp,
    "relu.default": extremes.convert_relu,
    "hardtanh.default": extremes.convert_hardtanh,
    "hardsigmoid.default": extremes.convert_hardsigmoid,
    "hardswish.default": extremes.convert_hardswish,
    "elu.default": extremes.convert_elu,
    "softshrink.default": extremes.convert_softshrink,
    "remainder.Scalar": remainders.convert_remainder,
    "remainder.Tensor": remainders.convert_remainder,
    "floor_divide.default": remainders.convert_floor_divide,
    "div.Tensor_mode": remainders.convert_floor_divide,
    "amax.default": reductions.convert_extreme,
    "amin.default": reductions.convert_extreme,
    "max.default": reductions.convert_extreme,
    "min.default": reductions.convert_extreme,
    "max.dim": reductions.convert_extreme_and_position,
    "min.dim": reductions.convert_extreme_and_position,
    "argmax.default": reductions.convert_position,
    "argmin.default": reductions.convert_position,
    "prod.dim_int": reductions.convert_product,
    "max_pool1d.default": pooling.convert_max_pool,
    "max_pool2d.default": pooling.convert_max_pool,
    "max_pool3d.default": pooling.convert_max_pool,
    "max_pool2d_with_indices.default": pooling.convert_max_pool,
    "max_pool3d_with_indices.default": pooling.convert_max_pool,
    "upsample_nearest2d.default": resizing.convert_nearest,
    "upsample_bilinear2d.default": resizing.convert_bilinear,
    "upsample_nearest2d.vec": resizing.convert_nearest,
    "upsample_bilinear2d.vec": resizing.convert_bilinear,
    "sort.default": sorting.convert_sort,
    "sort.stable": sorting.convert_sort,
    "argsort.default": sorting.convert_argsort,
    "topk.default": sorting.convert_topk,
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
