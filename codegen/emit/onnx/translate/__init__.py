"""Calls of our operators become nodes of the domain ``sparsify``, one file for each family.

``torch.onnx.export`` calls a translation with the arguments of the operator, tensors as ONNX
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsify import ops
from sparsify.codegen.emit.onnx.state import APPENDED, BOUNDED
from sparsify.codegen.emit.onnx.translate import attention, cache, linear, mixture, tokens

Translation = Callable[..., Any]


def translations() -> dict[Any, Translation]:
    """``custom_translation_table`` of ``torch.onnx.export``."""
    table = {ops.OPERATORS[name].overload: function for name, function in _TRANSLATIONS.items()}
    return {**table, APPENDED: cache.kv_append, BOUNDED: cache.page_bounds}


_TRANSLATIONS: dict[str, Translation] = {
    "sparse_linear": linear.sparse_linear,
    "active_linear": linear.active_linear,
    "gated_linear": linear.gated_linear,
    "fused_norm": tokens.fused_norm,
    "fused_attention": attention.fused_attention,
    "block_attention": attention.block_attention,
    "list_blocks": attention.list_blocks,
    "rotary": tokens.rotary,
    "gate": tokens.gate,
    "gated": tokens.gated,
    "route": mixture.route,
    "experts": mixture.experts,
    "paged_attention": cache.paged_attention,
    "select_blocks": cache.select_blocks,
    "select_pages": cache.select_pages,
}
