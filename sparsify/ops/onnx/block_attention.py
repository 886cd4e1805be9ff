"""``block_attention`` in ONNX: ``BlockAttention[Mask|Bias][Softcap]``.

Attention as in `sparsify.ops.onnx.attention` over the blocks of keys that are listed for each block
of queries. ``causal``, ``window`` and ``sinks`` (0: none) and the mask hide keys of partial blocks
alone. ``skip`` allows to leave out blocks whose weights are all below ``exp(-skip)``; 0 forbids it.
"""

from __future__ import annotations

from itertools import product

from sparsify.ops.onnx.attention import (
    ATTRIBUTES,
    BEHIND,
    CAPPED,
    CONSTANTS,
    INPUTS,
    LOWEST,
    MASKS,
    NEAR,
    OUTPUTS,
    POSITIONS,
    SCORES,
    Mask,
    found,
    masked,
    softmax,
)
from sparsify.ops.onnx.schema import OnnxOperator, Port, lines

_LISTS = tuple(
    Port(f"{kind}{name}", ("int32",), shape)
    for kind in ("", "full_")
    for name, shape in (
        ("counts", "[1 or batch, a divisor of heads, query_blocks]"),
        ("indices", "[1 or batch, a divisor of heads, query_blocks, most]"),
    )
)
_BLOCKS = (
    "sizes = Constant <value_ints: ints = @block> ()",
    "query_size = Slice(sizes, none, one)",
    "key_size = Slice(sizes, one, two)",
    "query_places = Div(query_range, query_size)",
    "key_places = Div(key_positions, key_size)",
    "last_key_place = Sub(key_length, one)",
    "last_block = Div(last_key_place, key_size)",
    "block_number = Add(last_block, one)",
    "block_count = Squeeze(block_number)",
    "columns = Range(begin, block_count, step)",
    "batch_length = Shape <start: int = 0, end: int = 1> (query)",
    "batch_count = Squeeze(batch_length)",
    "batch_range = Range(begin, batch_count, step)",
    "list_batches = Shape <start: int = 0, end: int = 1> (counts)",
    "batch_products = Mul(batch_range, list_batches)",
    "batch_places = Div(batch_products, batch_length)",
    "head_number = Squeeze(head_count)",
    "head_range = Range(begin, head_number, step)",
    "list_heads = Shape <start: int = 1, end: int = 2> (counts)",
    "head_products = Mul(head_range, list_heads)",
    "head_places = Div(head_products, head_count)",
)
_RULE = (
    *POSITIONS,
    *NEAR,
    BEHIND,
    "causal_number = Constant <value_int: int = @causal> ()",
    "any_order = Equal(causal_number, begin)",
    "in_order = Or(any_order, behind)",
    "no_window = Equal(window_size, begin)",
    "close = Or(no_window, near)",
    "rule = And(in_order, close)",
)


def block_attention(mask: Mask, softcap: bool) -> OnnxOperator:
    """The operator of this kind."""
    allowed: dict[Mask, tuple[str, ...]] = {
        "none": ("some = And(partial, rule)", "seen = Or(full, some)"),
        "mask": (
            "allowed = And(mask, rule)",
            "some = And(partial, allowed)",
            "seen = Or(full, some)",
        ),
        "bias": (
            "allowed = And(partial, rule)",
            "biased = Where(allowed, mask, infinite)",
            "seen = Where(full, nothing, biased)",
        ),
    }
    kind: Mask = "mask" if mask == "none" else mask
    return OnnxOperator(
        f"BlockAttention{'' if mask == 'none' else mask.capitalize()}{'Softcap' * softcap}",
        "block_attention",
        "Multi-head attention over listed blocks of keys; in partial ones only keys that the "
        "mask, causality and the window leave are seen",
        (*INPUTS, *_LISTS, *MASKS[mask]),
        OUTPUTS,
        {
            **ATTRIBUTES,
            "block": "ints",
            "causal": "int",
            "window": "int",
            "sinks": "int",
            "skip": "float",
            **({"softcap": "float"} if softcap else {}),
        },
        lines(
            *CONSTANTS,
            *SCORES,
            *(CAPPED if softcap else ()),
            *LOWEST,
            *_RULE,
            *_BLOCKS,
            *_spread("partial", "counts", "indices"),
            *_spread("full", "full_counts", "full_indices"),
            *allowed[mask],
            *masked(kind, "seen"),
            *softmax("capped" if softcap else "scaled"),
            *found(zeroed=True),
        ),
    )


def _spread(kind: str, counts: str, indices: str) -> tuple[str, ...]:
    """Whether each score lies in a block of this kind, ``[batch, heads, queries, keys]``."""
    return (
        f"{kind}_most = Shape <start: int = 3, end: int = 4> ({indices})",
        f"{kind}_most_number = Squeeze({kind}_most)",
        f"{kind}_numbers = Range(begin, {kind}_most_number, step)",
        f"{kind}_wide_counts = Cast <to: int = 7> ({counts})",
        f"{kind}_ends = Unsqueeze({kind}_wide_counts, last)",
        f"{kind}_valid = Less({kind}_numbers, {kind}_ends)",
        f"{kind}_wide = Cast <to: int = 7> ({indices})",
        f"{kind}_listed = Where({kind}_valid, {kind}_wide, last)",
        f"{kind}_each = Unsqueeze({kind}_listed, last)",
        f"{kind}_equal = Equal({kind}_each, columns)",
        f"{kind}_marks = Cast <to: int = 1> ({kind}_equal)",
        f"{kind}_fourth = Constant <value_ints: ints = [3]> ()",
        f"{kind}_any = ReduceMax <keepdims: int = 0> ({kind}_marks, {kind}_fourth)",
        f"{kind}_batches = Gather <axis: int = 0> ({kind}_any, batch_places)",
        f"{kind}_heads = Gather <axis: int = 1> ({kind}_batches, head_places)",
        f"{kind}_rows = Gather <axis: int = 2> ({kind}_heads, query_places)",
        f"{kind}_scores = Gather <axis: int = 3> ({kind}_rows, key_places)",
        f"{kind} = Cast <to: int = 9> ({kind}_scores)",
    )


KINDS = tuple(block_attention(mask, softcap) for mask, softcap in product(MASKS, (False, True)))
