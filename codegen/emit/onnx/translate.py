"""Calls of our operators become nodes of the domain ``sparsify``, one function for each family.

``torch.onnx.export`` calls them with the arguments of the operator, tensors as ONNX values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsify import ops
from sparsify.codegen.emit.onnx.state import APPENDED, BOUNDED
from sparsify.ops.onnx import DOMAIN, VERSION, OnnxOperator
from sparsify.ops.onnx import active as actives
from sparsify.ops.onnx import attention as attentions
from sparsify.ops.onnx import block_attention as block_attentions
from sparsify.ops.onnx import block_selection as blocks
from sparsify.ops.onnx import experts as mixtures
from sparsify.ops.onnx import gate as rules
from sparsify.ops.onnx import gated as gates
from sparsify.ops.onnx import kv_cache as caches
from sparsify.ops.onnx import linear as linears
from sparsify.ops.onnx import norm as norms
from sparsify.ops.onnx import page_selection as selections
from sparsify.ops.onnx import rotary as rotaries
from sparsify.ops.onnx import route as routes
from sparsify.ops.onnx.list_blocks import LIST_BLOCKS
from sparsify.routers import parse as parse_router

Translation = Callable[..., Any]


def emit(operator: OnnxOperator, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Adds a node to the graph that is being translated; its output or outputs."""
    from onnxscript.values import Op, Opset

    missing = operator.attributes.keys() ^ attributes.keys()
    assert not missing and len(inputs) == len(operator.inputs), (operator.name, missing)
    node = Op(Opset(DOMAIN, VERSION), operator.name, operator.op_schema())
    return node(*inputs, **attributes)


def translations() -> dict[Any, Translation]:
    """``custom_translation_table`` of ``torch.onnx.export``."""
    table = {ops.OPERATORS[name].overload: function for name, function in _TRANSLATIONS.items()}
    return {**table, APPENDED: _kv_append, BOUNDED: _page_bounds}


def _sparse_linear(
    x: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    bias: Any = None,
    activation: str = "none",
    residual: Any = None,
    lanes: bool = False,
) -> Any:
    assert not lanes
    storage = _storage(layout)
    return emit(
        linears.linear(storage, activation, bias is not None, residual is not None),
        [x, *weight, *(value for value in (bias, residual) if value is not None)],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        activation=activation,
    )


def _active_linear(
    x: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: Any = None,
    activation: str = "none",
    residual: Any = None,
) -> Any:
    storage = _storage(layout)
    return emit(
        actives.active_linear(storage, activation, bias is not None, residual is not None),
        [x, *weight, *(value for value in (bias, residual) if value is not None)],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        activation=activation,
        active=active,
    )


def _gated_linear(
    x: Any,
    gate: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: Any = None,
) -> Any:
    storage = _storage(layout)
    return emit(
        actives.gated_linear(storage, bias is not None),
        [x, *weight, *(() if bias is None else (bias,)), gate],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        active=active,
    )


def _storage(layout: str) -> linears.Storage:
    return "dense" if layout == "dense" else "csr"


def _fused_norm(
    x: Any, weight: Any, bias: Any, epsilon: float, kind: str = "layer", lanes: bool = False
) -> Any:
    assert not lanes
    scale = _vector(x, 1.0) if weight is None else weight
    if kind == "rms":
        return emit(norms.RMS, [x, scale], epsilon=epsilon)
    shift = _vector(x, 0.0) if bias is None else bias
    return emit(norms.LAYER, [x, scale, shift], epsilon=epsilon)


def _vector(x: Any, value: float) -> Any:
    """A constant for each feature of ``x``."""
    import onnxscript

    array = np.full(int(x.shape[-1]), value, np.float32)
    return onnxscript.opset18.Constant(value=onnxscript.ir.tensor(array))


def _fused_attention(
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


def _block_attention(
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


def _list_blocks(marks: Any) -> Any:
    return emit(LIST_BLOCKS, [marks])


def _mask_kind(mask: Any) -> attentions.Mask:
    import onnxscript

    if mask is None:
        return "none"
    return "mask" if mask.dtype == onnxscript.ir.DataType.BOOL else "bias"


def _rotary(x: Any, cos: Any, sin: Any, heads: int, head_dim: int, lanes: bool = False) -> Any:
    assert not lanes
    return emit(rotaries.ROTARY, [x, cos, sin], heads=heads, head_dim=head_dim)


def _gate(x: Any, rule: str, parameters: Sequence[Any], lanes: bool = False) -> Any:
    assert not lanes
    operator, attributes = rules.gate(rule, int(x.shape[-1]))
    return emit(operator, [x, *parameters], **attributes)


def _gated(x: Any, activation: str, lanes: bool = False) -> Any:
    assert not lanes
    return emit(gates.gated(activation), [x], activation=activation)


def _route(logits: Any, router: str, parameters: Sequence[Any]) -> Any:
    operator, attributes = routes.operator_of(parse_router(router), int(logits.shape[1]))
    return emit(operator, [logits, *parameters], **attributes)


def _experts(
    x: Any,
    experts: Any,
    weights: Any,
    up: Sequence[Any],
    down: Sequence[Any],
    bias: Sequence[Any],
    up_layout: str,
    down_layout: str,
    count: int,
    out_features: int,
    hidden: int,
    in_features: int,
    activation: str,
    gated: bool = True,
) -> Any:
    assert up_layout == down_layout == "dense"
    return emit(
        mixtures.experts(gated, activation, bool(bias)),
        [x, experts, weights, *up, *down, *bias],
        count=count,
        out_features=out_features,
        hidden=hidden,
        in_features=in_features,
        activation=activation,
    )


def _kv_append(
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


def _paged_attention(
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
) -> Any:
    assert not extents
    lists, sizes = ([], {}) if selected is None else ([selected], {"block": list(block)})
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


def _page_bounds(bounds: Any, keys: Any, pages: Any, lengths: Any, counts: Any, layer: int) -> Any:
    return emit(selections.BOUNDS, [bounds, keys, pages, lengths, counts], layer=layer)


def _select_pages(
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


def _select_blocks(
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


_TRANSLATIONS: dict[str, Translation] = {
    "sparse_linear": _sparse_linear,
    "active_linear": _active_linear,
    "gated_linear": _gated_linear,
    "fused_norm": _fused_norm,
    "fused_attention": _fused_attention,
    "block_attention": _block_attention,
    "list_blocks": _list_blocks,
    "rotary": _rotary,
    "gate": _gate,
    "gated": _gated,
    "route": _route,
    "experts": _experts,
    "paged_attention": _paged_attention,
    "select_blocks": _select_blocks,
    "select_pages": _select_pages,
}
