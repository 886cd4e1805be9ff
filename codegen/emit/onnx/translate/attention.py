"""Attention over keys and values of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.codegen.emit.onnx.translate.node import emit
from sparsify.ops.onnx import attention as attentions
from sparsify.ops.onnx import block_attention as block_attentions
from sparsify.ops.onnx.list_blocks import LIST_BLOCKS


def fused_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    causal: bool = False,
    extents: Sequence[int] = (),
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
) -> Any:
    assert not extents
    return emit(
        attentions.attention(_mask_kind(mask), causal, window > 0, softcap > 0),
        [query, key, value, *(() if mask is None else (mask,))],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        offsets=list(offsets),
        scale=scale,
        **({"window": window, "sinks": sinks} if window else {}),
        **({"softcap": softcap} if softcap else {}),
    )


def block_attention(
    query: Any,
    key: Any,
    value: Any,
    blocks: Sequence[Any],
    mask: Any,
    heads: int,
    kv_heads: int,
    head_dim: int,
    offsets: Sequence[int],
    scale: float,
    block: Sequence[int],
    causal: bool = False,
    window: int = 0,
    sinks: int = 0,
    softcap: float = 0.0,
    skip: float = 0.0,
    extents: Sequence[int] = (),
) -> Any:
    assert not extents
    return emit(
        block_attentions.block_attention(_mask_kind(mask), softcap > 0),
        [query, key, value, *blocks, *(() if mask is None else (mask,))],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        offsets=list(offsets),
        scale=scale,
        block=list(block),
        causal=int(causal),
        window=window,
        sinks=sinks,
        skip=skip,
        **({"softcap": softcap} if softcap else {}),
    )


def list_blocks(marks: Any) -> Any:
    return emit(LIST_BLOCKS, [marks])


def _mask_kind(mask: Any) -> attentions.Mask:
    import onnxscript

    if mask is None:
        return "none"
    return "mask" if mask.dtype == onnxscript.ir.DataType.BOOL else "bias"
