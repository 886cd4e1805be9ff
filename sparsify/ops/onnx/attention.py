"""``fused_attention`` in ONNX: ``Attention[Mask|Bias][Causal][Window][Softcap]``.

``softmax(q k^T * scale + mask) v`` for each head. A query head takes the features
``offsets[0] + h * head_dim`` and on; its key and value head is ``h * kv_heads // heads``, at
``offsets[1]`` and ``offsets[2]``. One tensor may serve as query, key and value. A query that sees
no key gives zeros. A window of so many tokens hides none of the first ``sinks`` keys; a softcap
bends scores to ``softcap * tanh(s / softcap)``.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

from sparsify.ops.onnx.schema import (
    FLOAT,
    AttributeType,
    OnnxOperator,
    Port,
    extent,
    integer,
    lines,
)

Mask = Literal["none", "mask", "bias"]

MASKS: dict[Mask, tuple[Port, ...]] = {
    "none": (),
    "mask": (Port("mask", ("bool",), "broadcastable to the scores; true: the key is seen"),),
    "bias": (Port("mask", FLOAT, "broadcastable to the scores, added to them"),),
}
CONSTANTS = (
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
SCORES = (
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
POSITIONS = (
    "query_length = Shape <start: int = 1, end: int = 2> (query)",
    "key_length = Shape <start: int = 1, end: int = 2> (key)",
    "query_count = Squeeze(query_length)",
    "key_count = Squeeze(key_length)",
    "begin = Constant <value_int: int = 0> ()",
    "step = Constant <value_int: int = 1> ()",
    "query_range = Range(begin, query_count, step)",
    "key_positions = Range(begin, key_count, step)",
    "query_positions = Unsqueeze(query_range, last)",
)
BEHIND = "behind = GreaterOrEqual(query_positions, key_positions)"
NEAR = (
    "distance = Sub(query_positions, key_positions)",
    "apart = Abs(distance)",
    "window_size = Constant <value_int: int = @window> ()",
    "sink_count = Constant <value_int: int = @sinks> ()",
    "inside = Less(apart, window_size)",
    "sink = Less(key_positions, sink_count)",
    "near = Or(inside, sink)",
)
CAPPED = (
    "cap = Constant <value_float: float = @softcap> ()",
    "share = Div(scaled, cap)",
    "bent = Tanh(share)",
    "capped = Mul(bent, cap)",
)
LOWEST = (
    "infinite = Constant <value_float: float = -inf> ()",
    "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
    "nothing = Constant <value_float: float = 0.0> ()",
)

# Masks are added: ONNX Runtime adds several times faster than it selects, and makes the summand
# once for all layers. A float mask hides what it lowers to minus infinity. Hidden scores are
# finite, since a row of infinities has no softmax; ``any`` zeros the rows that see nothing.
_BARRIER: dict[Mask, tuple[str, ...]] = {
    "mask": (
        "ones = Cast <to: int = 1> (grouped)",
        "any = ReduceMax <keepdims: int = 1> (ones, last)",
        "barrier = Where(grouped, nothing, lowest)",
    ),
    "bias": (
        "top = ReduceMax <keepdims: int = 1> (grouped, last)",
        "some = Greater(top, infinite)",
        "any = Cast <to: int = 1> (some)",
        "barrier = Max(grouped, lowest)",
    ),
}


ATTRIBUTES: dict[str, AttributeType] = {
    "heads": "int",
    "kv_heads": "int",
    "head_dim": "int",
    "offsets": "ints",
    "scale": "float",
}
INPUTS = (
    Port("query", FLOAT, "[batch, query_length, features]"),
    Port("key", FLOAT, "[batch, key_length, features]"),
    Port("value", FLOAT, "[batch, key_length, features]"),
)
OUTPUTS = (Port("y", FLOAT, "[batch, query_length, heads * head_dim]"),)


def attention(
    mask: Mask, causal: bool, window: bool = False, softcap: bool = False
) -> OnnxOperator:
    """The operator of this kind."""
    scores = "capped" if softcap else "scaled"
    return OnnxOperator(
        f"Attention{'' if mask == 'none' else mask.capitalize()}{'Causal' * causal}"
        f"{'Window' * window}{'Softcap' * softcap}",
        "fused_attention",
        "Multi-head attention on unsplit projections: softmax(q k^T * scale"
        + (" + mask" if mask != "none" else "")
        + ") v"
        + ("; key j is seen by query i only if j <= i" if causal else "")
        + ("; and only if |i - j| < window or j < sinks" if window else "")
        + ("; scores s become softcap * tanh(s / softcap)." if softcap else "."),
        (*INPUTS, *MASKS[mask]),
        OUTPUTS,
        {
            **ATTRIBUTES,
            **({"window": "int", "sinks": "int"} if window else {}),
            **({"softcap": "float"} if softcap else {}),
        },
        lines(
            *CONSTANTS,
            *SCORES,
            *(CAPPED if softcap else ()),
            *_weights(mask, causal, window, scores),
            *found(zeroed=mask != "none" or window),
        ),
    )


def _weights(mask: Mask, causal: bool, window: bool, scores: str) -> tuple[str, ...]:
    """The softmax of what is seen."""
    if mask == "none" and not causal and not window:
        return (f"weights = Softmax <axis: int = -1> ({scores})",)
    if mask == "none" and not window:  # every query sees the first key
        barrier = "barrier = Where(behind, nothing, lowest)"
        return (*POSITIONS, BEHIND, *LOWEST, barrier, *softmax(scores))
    reached = {
        (True, False): (BEHIND, "reached = Identity(behind)"),
        (False, True): (*NEAR, "reached = Identity(near)"),
        (True, True): (BEHIND, *NEAR, "reached = And(near, behind)"),
        (False, False): (),
    }[causal, window]
    seen = {
        "none": (
            "leading = Concat <axis: int = 0> (none, one)",
            "seen = Unsqueeze(reached, leading)",
        ),
        "mask": ("seen = And(mask, reached)",),
        "bias": ("seen = Where(reached, mask, infinite)",),
    }[mask]
    if not reached:
        return (*LOWEST, *masked(mask, "mask"), *softmax(scores))
    kind: Mask = "mask" if mask == "none" else mask
    return (*LOWEST, *POSITIONS, *reached, *seen, *masked(kind, "seen"), *softmax(scores))


def masked(mask: Mask, seen: str) -> tuple[str, ...]:
    """The barrier of a mask ``[batch, heads, queries, keys]``.

    Scores have their heads on two axes, key heads and groups of them. A mask has all on one, or
    one for all of them; it is split like them, once for all layers that share it.
    """
    return (
        f"mask_batch = Shape <start: int = 0, end: int = 1> ({seen})",
        f"mask_heads = Shape <start: int = 1, end: int = 2> ({seen})",
        f"mask_rest = Shape <start: int = 2, end: int = 4> ({seen})",
        "mask_kv_heads = Min(mask_heads, kv_head_count)",
        "mask_groups = Div(mask_heads, mask_kv_heads)",
        "mask_shape = Concat <axis: int = 0> (mask_batch, mask_kv_heads, mask_groups, mask_rest)",
        f"grouped = Reshape({seen}, mask_shape)",
        *_BARRIER[mask],
    )


def softmax(scores: str) -> tuple[str, ...]:
    """Weights of the scores behind the barrier."""
    return (f"hidden = Add({scores}, barrier)", "weights = Softmax <axis: int = -1> (hidden)")


def found(zeroed: bool) -> tuple[str, ...]:
    """The sums of values, heads side by side again; zeros where a query sees nothing."""
    plain = ("found = MatMul(weights, value_heads)",)
    zeros = ("any_found = MatMul(weights, value_heads)", "found = Mul(any_found, any)")
    return (
        *(zeros if zeroed else plain),
        "tokens = Transpose <perm: ints = [0, 3, 1, 2, 4]> (found)",
        "joined = Concat <axis: int = 0> (none, none, last)",
        "y = Reshape(tokens, joined)",
    )


_FLAGS = (False, True)
KINDS = tuple(
    attention(mask, causal, window, softcap)
    for mask, causal, window, softcap in product(MASKS, _FLAGS, _FLAGS, _FLAGS)
)
