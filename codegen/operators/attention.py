"""Attention: over keys and values of the program, and over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint
from tvm import tirx

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.attention import Attention
from sparsify.codegen.kernels.cpu.attention_mask import QUERY_PADDING, AttentionMask, MaskShape
from sparsify.codegen.kernels.cpu.kv_append import KvAppend
from sparsify.codegen.kernels.cpu.list_blocks import ListBlocks
from sparsify.codegen.kernels.cpu.paged_decode import PagedDecode
from sparsify.codegen.kernels.cpu.paged_prefill import PagedPrefill
from sparsify.codegen.kernels.cpu.scores import Scores
from sparsify.codegen.operators.arguments import (
    arguments_of,
    extents_of,
    flat,
    from_lanes,
    lane_groups,
    product,
    shape_of,
    to_lanes,
)
from sparsify.layouts import FEW_TOKENS, LANES
from sparsify.ops import expected_tokens

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering

_WIDEST_TILE = 32
"""Queries of a tile, at most; others divide it."""


def query_vectors(isa: Isa) -> int:
    """Query tile of attention, in vectors: the keys' scores must fit the registers beside it."""
    wide = {16: 2, 8: 1, 4: 4}[isa.vector]
    return wide if isa.registers >= 32 else max(1, wide // 2)


_WIDE_QUERIES = 512
"""Queries of a sequence from which tiles are wide."""


def convert_fused_attention(node: fx.Node, lowering: Lowering) -> Any:
    return _attention(node, lowering, (), None, 0.0)


def convert_block_attention(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    lists = [lowering.tensor(tensor) for tensor in a["blocks"]]
    return _attention(node, lowering, lists, (a["block"][0], a["block"][1]), a["skip"])


def _attention(
    node: fx.Node,
    lowering: Lowering,
    lists: Sequence[Any],
    block: tuple[int, int] | None,
    skip: float,
) -> Any:
    a = arguments_of(node)
    query, key, value = (lowering.tensor(a[name]) for name in ("query", "key", "value"))
    in_lanes = bool(a["extents"])
    if in_lanes:
        extents = extents_of(lowering, a["extents"])
    else:
        extents = [*shape_of(query)[:2], shape_of(key)[1]]
        lanes = {v: to_lanes(lowering, v) for v in dict.fromkeys((query, key, value))}
        query, key, value = lanes[query], lanes[key], lanes[value]
    isa = lowering.target.isa
    mask, mask_shape = _prepared_mask(lowering, a["mask"], extents)
    kernel = Attention(
        isa,
        a["heads"],
        a["kv_heads"],
        a["head_dim"],
        tuple(int(shape_of(t)[1]) for t in (query, key, value)),  # type: ignore[arg-type]
        tuple(a["offsets"]),
        Scores(a["scale"], a["window"], a["softcap"]),
        a["causal"],
        a["sinks"],
        mask_shape,
        _tile_vectors(isa, block, _expected_queries(a)),
        block,
        skip,
    )
    groups = lowering.extent(node.meta["val"].shape[0])
    if not in_lanes:
        groups = lane_groups(extents[0] * extents[1])
    shape = (groups, a["heads"] * a["head_dim"], LANES)
    y = lowering.call_kernel(kernel, [query, key, value, mask, *lists], shape, extents)
    return y if in_lanes else from_lanes(lowering, y, extents[:2])


def _expected_queries(a: dict[str, Any]) -> int:
    """Of a sequence, in the example inputs."""
    if a["extents"]:
        length = a["extents"][1]
        queries = length.meta["val"] if isinstance(length, fx.Node) else length
    else:
        queries = a["query"].meta["val"].shape[1]
    return queries if isinstance(queries, int) else optimization_hint(queries, fallback=1)


def _tile_vectors(isa: Isa, block: tuple[int, int] | None, queries: int) -> int:
    """Where registers allow, tiles of many queries are twice as wide: keys are read half as often.

    Few queries would fill too little of the last tile.
    """
    vectors = query_vectors(isa)
    wide = 2 * vectors
    fits = queries >= _WIDE_QUERIES if block is None else block[0] % (wide * LANES) == 0
    return wide if fits and isa.vector == LANES else vectors


def _prepared_mask(
    lowering: Lowering, node: fx.Node | None, extents: Sequence[Any]
) -> tuple[Any, MaskShape | None]:
    """The mask as the attention kernel reads it; made once however many layers use it."""
    if node is None:
        return None, None
    batch, heads, queries, _ = node.meta["val"].shape
    shape = MaskShape(*(_varies(extent) for extent in (batch, heads, queries)))
    made = lowering.prepared_masks.get(node)
    if made is None:
        mask = lowering.tensor(node)
        dtype = "bool" if node.meta["val"].dtype == torch.bool else "float32"
        planes = shape_of(mask)
        padded = tirx.IntImm("int64", 1)
        if shape.queries:
            padded = tirx.floordiv(planes[2] + (QUERY_PADDING - 1), QUERY_PADDING) * QUERY_PADDING
        kernel = AttentionMask(shape, dtype)
        made = lowering.call_kernel(kernel, [mask], (planes[0], planes[1], extents[2], padded))
        lowering.prepared_masks[node] = made
    return made, shape


def _varies(extent: int | torch.SymInt) -> bool:
    return not (isinstance(extent, int) and extent == 1)


def convert_list_blocks(node: fx.Node, lowering: Lowering) -> Any:
    marks = lowering.tensor(arguments_of(node)["marks"])
    rows = flat(lowering, marks)
    listed = lowering.call_kernel(ListBlocks(), [rows], shape_of(rows), dtype="int32")
    return lowering.reshape(listed, shape_of(marks))


def convert_kv_append(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    names = ("keys", "values", "key", "value", "pages", "starts", "counts")
    keys, values, key, value, *rest = (lowering.tensor(a[name]) for name in names)
    _, _, kv_heads, head_dim, _ = shape_of(keys)
    in_lanes = bool(a["extents"])
    length = extents_of(lowering, a["extents"])[1] if in_lanes else shape_of(key)[1]
    key, value = (x if in_lanes else flat(lowering, x) for x in (key, value))
    kernel = KvAppend(
        lowering.target.isa,
        int(kv_heads),
        int(head_dim),
        (int(shape_of(key)[1]), int(shape_of(value)[1])),
        tuple(a["offsets"]),
        "lanes" if in_lanes else "rows",
    )
    integers = [tirx.IntImm("int64", a["layer"]), length]
    shape = lowering.type_of(node.meta["val"]).shape.values
    operands = [keys, values, key, value, *rest]
    return lowering.call_kernel(kernel, operands, shape, integers, "int64")


def convert_paged_attention(node: fx.Node, lowering: Lowering) -> Any:
    """Few tokens stay row-major; many are converted to lanes unless they are there already."""
    a = arguments_of(node)
    names = ("query", "keys", "values", "pages", "lengths", "counts", "selected")
    query, keys, *rest = (lowering.tensor(a[name]) for name in names)
    kv_heads, head_dim = (int(extent) for extent in shape_of(keys)[2:4])
    heads, features = (a["heads"], kv_heads, head_dim), a["heads"] * head_dim
    in_lanes, isa = bool(a["extents"]), lowering.target.isa
    scores = Scores(a["scale"], a["window"], a["softcap"])
    leading = extents_of(lowering, a["extents"]) if in_lanes else shape_of(query)[:2]
    integers = [tirx.IntImm("int64", a["layer"]), leading[1]]
    if not in_lanes and expected_tokens(a["query"].meta["val"]) <= FEW_TOKENS:
        selected = a["selected"] is not None
        decode = PagedDecode(isa, *heads, int(shape_of(query)[2]), a["offset"], scores, selected)
        rows = flat(lowering, query)
        y = lowering.call_kernel(
            decode, [rows, keys, *rest], (product(leading), features), integers
        )
        return lowering.reshape(y, (*leading, features))
    query = query if in_lanes else to_lanes(lowering, query)
    prefill = PagedPrefill(
        isa,
        *heads,
        int(shape_of(query)[1]),
        a["offset"],
        scores,
        query_vectors(isa),
        None if a["selected"] is None else tuple(a["block"]),
        a["skip"],
    )
    shape = (shape_of(query)[0], features, LANES)
    y = lowering.call_kernel(prefill, [query, keys, *rest], shape, integers)
    return y if in_lanes else from_lanes(lowering, y, leading)


def refuse_paged_attention(node: fx.Node) -> str | None:
    """Lists of selected blocks that the kernels do not read."""
    a = arguments_of(node)
    if a["selected"] is None:
        return None
    if a["window"]:
        return "there is no kernel for selected blocks of keys within a window"
    lists, cache = (a[name].meta["val"].shape for name in ("selected", "keys"))
    if not a["extents"] and expected_tokens(a["query"].meta["val"]) <= FEW_TOKENS:
        if list(a["block"]) == [1, 1] and lists[1] == cache[2]:
            return None
        return "for few tokens, pages must be selected one by one, for each token and key head"
    if a["block"][0] % _WIDEST_TILE == 0:
        return None
    return f"blocks of {a['block'][0]} queries are not made of tiles of {_WIDEST_TILE}"
