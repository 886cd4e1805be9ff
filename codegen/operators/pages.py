"""Which pages of the cache are read, and the bounds of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import tirx

from sparsify.codegen.kernels.cpu.page_bounds import PageBounds
from sparsify.codegen.kernels.cpu.select_blocks import SelectBlocks
from sparsify.codegen.kernels.cpu.select_pages import SelectPages
from sparsify.codegen.operators.arguments import (
    arguments_of,
    extents_of,
    flat,
    shape_of,
    to_lanes,
)
from sparsify.ops import PAGE
from sparsify.selectors import BlockSelector, PageSelector, block_selector, page_selector

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_page_bounds(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    names = ("bounds", "keys", "pages", "lengths", "counts")
    tensors = [lowering.tensor(a[name]) for name in names]
    kv_heads, head_dim = (int(extent) for extent in shape_of(tensors[1])[2:4])
    parts = int(shape_of(tensors[0])[5])
    kernel = PageBounds(lowering.target.isa, kv_heads, head_dim, parts)
    # No sequence appends more than its row of the page table holds.
    most = shape_of(tensors[2])[1] * PAGE
    integers = [tirx.IntImm("int64", a["layer"]), most]
    return lowering.call_kernel(kernel, tensors, shape_of(tensors[3]), integers, "int64")


def refuse_select_pages(node: fx.Node) -> str | None:
    return _refused(page_selector(arguments_of(node)["selector"]))


def refuse_select_blocks(node: fx.Node) -> str | None:
    return _refused(block_selector(arguments_of(node)["selector"]))


def _refused(selector: PageSelector | BlockSelector) -> str | None:
    if selector.scoring is not None:
        return None
    return f"selector {selector} has no kernel, only its reference"


def convert_select_pages(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    selector = page_selector(a["selector"])
    assert selector.scoring is not None, "refused"
    query, keys = lowering.tensor(a["query"]), lowering.tensor(a["keys"])
    tensors = [lowering.tensor(tensor) for tensor in a["tensors"]]
    rest = [lowering.tensor(a[name]) for name in ("pages", "lengths", "counts")]
    kv_heads, head_dim = (int(extent) for extent in shape_of(keys)[2:4])
    channels, bounds = "channels" in selector.tensors, "bounds" in selector.tensors
    kernel = SelectPages(
        lowering.target.isa,
        a["heads"],
        kv_heads,
        head_dim,
        int(shape_of(query)[2]),
        a["offset"],
        selector.scoring,
        int(shape_of(tensors[0])[1]) if channels else None,
        int(shape_of(tensors[0])[5]) if bounds else 1,
        a["budget"],
        a["sinks"],
        a["recent"],
    )
    batch, length, _ = shape_of(query)
    integers = [tirx.IntImm("int64", a["layer"]), length]
    operands = [flat(lowering, query), keys, *tensors, *rest]
    shape = (batch, kv_heads, length, a["budget"])
    return lowering.call_kernel(kernel, operands, shape, integers, "int32")


def convert_select_blocks(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    selector = block_selector(a["selector"])
    assert selector.scoring is not None, "refused"
    query, keys, pages = (lowering.tensor(a[name]) for name in ("query", "keys", "pages"))
    in_lanes = bool(a["extents"])
    batch, length = extents_of(lowering, a["extents"]) if in_lanes else shape_of(query)[:2]
    query = query if in_lanes else to_lanes(lowering, query)
    kv_heads, head_dim = (int(extent) for extent in shape_of(keys)[2:4])
    kernel = SelectBlocks(
        lowering.target.isa,
        a["heads"],
        kv_heads,
        head_dim,
        int(shape_of(query)[1]),
        a["offset"],
        a["scale"],
        selector.scoring,
        "gates" in selector.tensors,
        tuple(a["block"]),
        a["density"],
        a["mass"],
        a["sinks"],
        a["recent"],
    )
    rows, columns = (
        tirx.floordiv(count + (size - 1), size)
        for count, size in zip((length, shape_of(pages)[1]), a["block"], strict=True)
    )
    tensors = [lowering.tensor(tensor) for tensor in a["tensors"]]
    rest = [pages, *(lowering.tensor(a[name]) for name in ("lengths", "counts"))]
    integers = [tirx.IntImm("int64", a["layer"]), length]
    shape = (batch, a["heads"], rows, columns)
    return lowering.call_kernel(kernel, [query, keys, *tensors, *rest], shape, integers, "int32")
