"""How each sparsify operator becomes calls of kernels.

Operators outside lanes are served too: their activations are converted on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from tvm import relax, tirx

from sparsify.codegen.kernels.cpu.attention import Attention
from sparsify.codegen.kernels.cpu.attention_mask import QUERY_PADDING, AttentionMask, MaskShape
from sparsify.codegen.kernels.cpu.embedding import Embedding
from sparsify.codegen.kernels.cpu.lanes import FromLanes, ToLanes
from sparsify.codegen.kernels.cpu.norm import Norm
from sparsify.codegen.registry import LinearSite, linear_kernels
from sparsify.layouts import LANES, parse
from sparsify.ops import OPERATORS

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering

_QUERY_VECTORS = {"avx512": 2, "avx2": 1, "neon": 4}
"""Query tile of attention, in vectors: eight keys' scores must fit the registers beside it."""


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of the operator's schema, defaults filled in."""
    names: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            names[argument.name] = node.args[i]
        else:
            names[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return names


def shape_of(value: Any) -> list[Any]:
    """The extents of a Relax tensor."""
    return list(value.ty.shape.values)


def _product(extents: Sequence[Any]) -> Any:
    total = tirx.IntImm("int64", 1)
    for extent in extents:
        total = total * extent
    return total


def _groups(tokens: Any) -> Any:
    return tirx.floordiv(tokens + (LANES - 1), LANES)


def _to_lanes(lowering: Lowering, x: Any, groups: int | torch.SymInt | None = None) -> Any:
    *leading, features = shape_of(x)
    tokens = _product(leading)
    count = _groups(tokens) if groups is None else lowering.extent(groups)
    rows = lowering.reshape(x, (tokens, features))
    kernel = ToLanes(lowering.target.isa, int(features))
    return lowering.call_kernel(kernel, [rows], (count, features, LANES))


def _from_lanes(lowering: Lowering, x: Any, leading: Sequence[Any]) -> Any:
    features = shape_of(x)[1]
    kernel = FromLanes(lowering.target.isa, int(features))
    rows = lowering.call_kernel(kernel, [x], (_product(leading), features))
    return lowering.reshape(rows, (*leading, features))


def _extents(lowering: Lowering, values: Sequence[Any]) -> list[Any]:
    return [lowering.extent(v.meta["val"] if isinstance(v, fx.Node) else v) for v in values]


def _convert_to_lanes(node: fx.Node, lowering: Lowering) -> Any:
    return _to_lanes(lowering, lowering.tensor(node.args[0]), node.meta["val"].shape[0])


def _convert_from_lanes(node: fx.Node, lowering: Lowering) -> Any:
    arguments = arguments_of(node)
    leading = _extents(lowering, arguments["leading"])
    return _from_lanes(lowering, lowering.tensor(arguments["x"]), leading)


def _convert_sparse_linear(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, bias, residual = (lowering.tensor(a[name]) for name in ("x", "bias", "residual"))
    layout = parse(a["layout"])
    site = LinearSite(
        a["out_features"],
        a["in_features"],
        bias is not None,
        a["activation"],
        residual is not None,
    )
    isa = lowering.target.isa
    kernel = linear_kernels(layout).kernel(isa, site, layout)
    leading = shape_of(x)[:-1]
    if not a["lanes"]:
        x = _to_lanes(lowering, x)
        residual = None if residual is None else _to_lanes(lowering, residual)
    weight = [lowering.tensor(w) for w in a["weight"]]
    shape = (shape_of(x)[0], site.out_features, LANES)
    y = lowering.call_kernel(kernel, [x, *weight, bias, residual], shape)
    return y if a["lanes"] else _from_lanes(lowering, y, leading)


def _convert_fused_norm(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, weight, bias = (lowering.tensor(a[name]) for name in ("x", "weight", "bias"))
    leading = shape_of(x)[:-1]
    if not a["lanes"]:
        x = _to_lanes(lowering, x)
    features = int(shape_of(x)[1])
    norm = Norm(
        lowering.target.isa, features, a["kind"], a["epsilon"], weight is not None, bias is not None
    )
    y = lowering.call_kernel(norm, [x, weight, bias], shape_of(x))
    return y if a["lanes"] else _from_lanes(lowering, y, leading)


def _convert_fused_attention(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    query, key, value = (lowering.tensor(a[name]) for name in ("query", "key", "value"))
    in_lanes = bool(a["extents"])
    if in_lanes:
        extents = _extents(lowering, a["extents"])
    else:
        extents = [*shape_of(query)[:2], shape_of(key)[1]]
        lanes = {v: _to_lanes(lowering, v) for v in dict.fromkeys((query, key, value))}
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
        a["scale"],
        a["causal"],
        mask_shape,
        _QUERY_VECTORS[isa.name],
    )
    groups = lowering.extent(node.meta["val"].shape[0])
    if not in_lanes:
        groups = _groups(extents[0] * extents[1])
    shape = (groups, a["heads"] * a["head_dim"], LANES)
    y = lowering.call_kernel(kernel, [query, key, value, mask], shape, extents)
    return y if in_lanes else _from_lanes(lowering, y, extents[:2])


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


def _convert_embedding(node: fx.Node, lowering: Lowering) -> Any:
    table, ids = (lowering.tensor(argument) for argument in node.args[:2])
    rows, features = (int(extent) for extent in shape_of(table))
    count = _product(shape_of(ids))
    kernel = Embedding(lowering.target.isa, rows, features, str(ids.ty.dtype))
    flat = lowering.call_kernel(kernel, [table, lowering.reshape(ids, (count,))], (count, features))
    return lowering.reshape(flat, (*shape_of(ids), features))


def _convert_slice(node: fx.Node, lowering: Lowering) -> Any:
    """A slice whose extent the graph knows: TVM's importer would clamp it to the input's."""
    source, a = node.args[0], arguments_of(node)
    x, dim, step = lowering.tensor(source), a["dim"], a["step"]
    dim %= len(shape_of(x))
    size = lowering.extent(node.meta["val"].shape[dim])
    (begin,) = _extents(lowering, [0 if a["start"] is None else a["start"]])
    if isinstance(begin, tirx.IntImm) and begin.value < 0:
        begin = shape_of(x)[dim] + begin
    end = begin + size * step
    return lowering.block_builder.emit(
        relax.op.strided_slice(x, [dim], [begin], [end], [step], assume_inbound=True)
    )


def _convert_select(node: fx.Node, lowering: Lowering) -> Any:
    """One entry of a dim, as a slice; TVM's importer would gather it, unchecked."""
    a = arguments_of(node)
    x = lowering.tensor(a["self"])
    dim = a["dim"] % len(shape_of(x))
    (begin,) = _extents(lowering, [a["index"]])
    if isinstance(begin, tirx.IntImm) and begin.value < 0:
        begin = shape_of(x)[dim] + begin
    entry = lowering.block_builder.emit(
        relax.op.strided_slice(x, [dim], [begin], [begin + 1], [1], assume_inbound=True)
    )
    return lowering.reshape(entry, lowering.type_of(node.meta["val"]).shape.values)


CONVERTERS: dict[str, Callable[[fx.Node, Lowering], Any]] = {
    f"{name}.default": globals()[f"_convert_{name}"] for name in OPERATORS
}
CONVERTERS["embedding.default"] = _convert_embedding
CONVERTERS["slice.Tensor"] = _convert_slice
CONVERTERS["select.int"] = _convert_select
"""By the operator's bare name, as TVM's importer looks converters up."""
