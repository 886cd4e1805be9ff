"""The paged cache, and what is chosen of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.codegen.emit.onnx.translate.node import emit
from sparsify.ops.onnx import block_selection as blocks
from sparsify.ops.onnx import kv_cache as caches
from sparsify.ops.onnx import page_selection as selections


def kv_append(
    keys: Any,
    values: Any,
    key: Any,
    value: Any,
    pages: Any,
    starts: Any,
    counts: Any,
    layer: int,
    offsets: Sequence[int],
) -> Any:
    inputs = [keys, values, key, value, pages, starts, counts]
    return emit(caches.APPEND, inputs, layer=layer, offsets=list(offsets))


def paged_attention(
    query: Any,
    keys: Any,
    values: Any,
    pages: Any,
    lengths: Any,
    counts: Any,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    extents: Sequence[int] = (),
    selected: Any = None,
    block: Sequence[int] = (1, 1),
    skip: float = 0.0,
) -> Any:
    assert not extents
    lists, sizes = (
        ([], {}) if selected is None else ([selected], {"block": list(block), "skip": skip})
    )
    cap = {"softcap": softcap} if softcap else {}
    return emit(
        caches.paged_attention(bool(softcap), selected is not None),
        [query, keys, values, pages, lengths, counts, *lists],
        layer=layer,
        heads=heads,
        offset=offset,
        scale=scale,
        window=window,
        **cap,
        **sizes,
    )


def page_bounds(bounds: Any, keys: Any, pages: Any, lengths: Any, counts: Any, layer: int) -> Any:
    return emit(selections.BOUNDS, [bounds, keys, pages, lengths, counts], layer=layer)


def select_pages(
    query: Any,
    keys: Any,
    tensors: Sequence[Any],
    pages: Any,
    lengths: Any,
    counts: Any,
    layer: int,
    heads: int,
    offset: int,
    selector: str,
    budget: int,
    sinks: int = 1,
    recent: int = 1,
) -> Any:
    return emit(
        selections.select_pages(selector),
        [query, keys, *tensors, pages, lengths, counts],
        layer=layer,
        heads=heads,
        offset=offset,
        budget=budget,
        sinks=sinks,
        recent=recent,
    )


def select_blocks(
    query: Any,
    keys: Any,
    tensors: Sequence[Any],
    pages: Any,
    lengths: Any,
    counts: Any,
    layer: int,
    heads: int,
    offset: int,
    scale: float,
    selector: str,
    block: Sequence[int],
    density: float,
    mass: float = 0.0,
    sinks: int = 1,
    recent: int = 1,
    extents: Sequence[int] = (),
) -> Any:
    assert not extents
    return emit(
        blocks.select_blocks(selector),
        [query, keys, *tensors, pages, lengths, counts],
        layer=layer,
        heads=heads,
        offset=offset,
        scale=scale,
        block=list(block),
        density=density,
        mass=mass,
        sinks=sinks,
        recent=recent,
    )
