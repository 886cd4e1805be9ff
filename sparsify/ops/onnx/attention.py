"""``fused_attention`` in ONNX: ``Attention[Mask|Bias][Causal]``.

``softmax(q k^T * scale + mask) v`` for each head. A query head takes the features
``offsets[0] + h * head_dim`` and on; its key and value head is ``h * kv_heads // heads``, at
``offsets[1]`` and ``offsets[2]``. One tensor may serve as query, key and value. A query that sees
no key gives zeros.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, extent, integer, lines

Mask = Literal["none", "mask", "bias"]

_MASKS: dict[Mask, tuple[Port, ...]] = {
    "none": (),
    "mask": (Port("mask", ("bool",), "broadcastable to the scores; true: the key is seen"),),
    "bias": (Port("mask", FLOAT, "broadcastable to the scores, added to them"),),
}
_CONSTANTS = (
    integer("none", 0),
    integer("one", 1),
    integer("two", 2),
    integer("three", 3),
    integer("last", -1),
    *extent("head_count", "heads"),
    *extent("kv_head_count", "kv_heads"),
    *extent("head_size", "head_dim"),
    "group_size = Div(head_count, kv_head_count)",
    "starts = Constant <value_ints: ints = @offsets> ()",
    "query_start = Slice(starts, none, one)",
    "key_start = Slice(starts, one, two)",
    "value_start = Slice(starts, two, three)",
    "query_features = Mul(head_count, head_size)",
    "kv_features = Mul(kv_head_count, head_size)",
    "query_end = Add(query_start, query_features)",
    "key_end = Add(key_start, kv_features)",
    "value_end = Add(value_start, kv_features)",
    "query_shape = Concat <axis: int = 0> (none, none, kv_head_count, group_size, head_size)",
    "kv_shape = Concat <axis: int = 0> (none, none, kv_head_count, one, head_size)",
    "factor = Constant <value_float: float = @scale> ()",
)
_SCORES = (
    "query_part = Slice(query, query_start, query_end, last)",
    "key_part = Slice(key, key_start, key_end, last)",
    "value_part = Slice(value, value_start, value_end, last)",
    "query_split = Reshape(query_part, query_shape)",
    "key_split = Reshape(key_part, kv_shape)",
    "value_split = Reshape(value_part, kv_shape)",
    "query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (query_split)",
    "key_heads = Transpose <perm: ints = [0, 2, 3, 4, 1]> (key_split)",
    "value_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (value_split)",
    "scores = MatMul(query_heads, key_heads)",
    "scaled = Mul(scores, factor)",
)
_REACHED = (
    "query_length = Shape <start: int = 1, end: int = 2> (query)",
    "key_length = Shape <start: int = 1, end: int = 2> (key)",
    "query_count = Squeeze(query_length)",
    "key_count = Squeeze(key_length)",
    "begin = Constant <value_int: int = 0> ()",
    "step = Constant <value_int: int = 1> ()",
    "query_range = Range(begin, query_count, step)",
    "key_positions = Range(begin, key_count, step)",
    "query_positions = Unsqueeze(query_range, last)",
    "reached = GreaterOrEqual(query_positions, key_positions)",
)
_INFINITE = "infinite = Constant <value_float: float = -inf> ()"
_LOWEST = "lowest = Constant <value_float: float = -3.4028234663852886e38> ()"

# A float mask hides what it lowers to minus infinity. Hidden scores are finite, since a row of
# infinities has no softmax; the zeros of a row that sees nothing come by ``any``.
_SEEN: dict[Mask, str] = {
    "mask": "seen = And(mask, reached)",
    "bias": "seen = Where(reached, mask, infinite)",
}
_HIDDEN: dict[Mask, tuple[str, ...]] = {
    "mask": (
        "ones = Cast <to: int = 1> ({seen})",
        "any = ReduceMax <keepdims: int = 1> (ones, last)",
        "hidden = Where({seen}, heads_apart, lowest)",
    ),
    "bias": (
        "top = ReduceMax <keepdims: int = 1> ({seen}, last)",
        "some = Greater(top, infinite)",
        "any = Cast <to: int = 1> (some)",
        "finite = Max({seen}, lowest)",
        "hidden = Add(heads_apart, finite)",
    ),
}


def attention(mask: Mask, causal: bool) -> OnnxOperator:
    """The operator of this kind."""
    return OnnxOperator(
        f"Attention{'' if mask == 'none' else mask.capitalize()}{'Causal' * causal}",
        "fused_attention",
        "Multi-head attention on unsplit projections: softmax(q k^T * scale"
        + (" + mask" if mask != "none" else "")
        + ") v"
        + ("; key j is seen by query i only if j <= i." if causal else "."),
        (
            Port("query", FLOAT, "[batch, query_length, features]"),
            Port("key", FLOAT, "[batch, key_length, features]"),
            Port("value", FLOAT, "[batch, key_length, features]"),
            *_MASKS[mask],
        ),
        (Port("y", FLOAT, "[batch, query_length, heads * head_dim]"),),
        {
            "heads": "int",
            "kv_heads": "int",
            "head_dim": "int",
            "offsets": "ints",
            "scale": "float",
        },
        lines(
            *_CONSTANTS, *_SCORES, *(_plain(causal) if mask == "none" else _masked(mask, causal))
        ),
    )


def _plain(causal: bool) -> tuple[str, ...]:
    hide = (*_REACHED, _LOWEST, "hidden = Where(reached, scaled, lowest)") if causal else ()
    return (
        *hide,
        f"weights = Softmax <axis: int = -1> ({'hidden' if causal else 'scaled'})",
        "found = MatMul(weights, value_heads)",
        "tokens = Transpose <perm: ints = [0, 3, 1, 2, 4]> (found)",
        "joined = Concat <axis: int = 0> (none, none, last)",
        "y = Reshape(tokens, joined)",
    )


def _masked(mask: Mask, causal: bool) -> tuple[str, ...]:
    """A mask has all heads on one axis, the products of grouped heads have them on two."""
    return (
        "rows = Shape <start: int = 1, end: int = 2> (query)",
        "apart = Concat <axis: int = 0> (none, head_count, rows, last)",
        "grouped = Concat <axis: int = 0> (none, kv_head_count, group_size, rows, last)",
        "heads_apart = Reshape(scaled, apart)",
        _INFINITE,
        _LOWEST,
        *((*_REACHED, _SEEN[mask]) if causal else ()),
        *(line.format(seen="seen" if causal else "mask") for line in _HIDDEN[mask]),
        "shares = Softmax <axis: int = -1> (hidden)",
        "weights = Reshape(shares, grouped)",
        "found_groups = MatMul(weights, value_heads)",
        "found_heads = Reshape(found_groups, apart)",
        "found = Mul(found_heads, any)",
        "tokens = Transpose <perm: ints = [0, 2, 1, 3]> (found)",
        "joined = Concat <axis: int = 0> (none, none, last)",
        "y = Reshape(tokens, joined)",
    )


KINDS = tuple(attention(mask, causal) for mask, causal in product(_MASKS, (False, True)))
