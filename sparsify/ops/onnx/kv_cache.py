"""``kv_append`` and ``paged_attention`` in ONNX: ``KvAppend``,
``PagedAttention[Softcap][Selected]``.

ONNX has no operators that write: the cache goes in and comes out. The tensors are those of
`sparsify.ops.kv_cache`.
"""

from __future__ import annotations

from itertools import product

from sparsify.ops.kv_cache import PAGE
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, extent, integer, lines

KEYS = f"[layers, pages, kv_heads, head_dim, {PAGE}]"
VALUES = f"[layers, pages, kv_heads, {PAGE}, head_dim]"
PAGES = Port("pages", ("int32",), "[batch, pages_of_a_sequence]")
COUNTS = Port("counts", ("int64",), "[batch], how many of the new tokens are real")

CONSTANTS = (
    integer("none", 0),
    integer("one", 1),
    integer("two", 2),
    integer("last", -1),
    integer("page_size", PAGE),
    "begin = Constant <value_int: int = 0> ()",
    "step = Constant <value_int: int = 1> ()",
    "wide_pages = Cast <to: int = 7> (pages)",
    "kv_heads = Shape <start: int = 2, end: int = 3> (keys)",
    "head_dim = Shape <start: int = 4, end: int = 5> (values)",
)


def positions(tokens: str) -> tuple[str, ...]:
    """The number of each new token in its row, and whether it is real."""
    return (
        f"length = Shape <start: int = 1, end: int = 2> ({tokens})",
        "length_number = Squeeze(length)",
        "numbers = Range(begin, length_number, step)",
        "row_counts = Unsqueeze(counts, last)",
        "real = Less(numbers, row_counts)",
    )


APPEND = OnnxOperator(
    "KvAppend",
    "kv_append",
    "Writes the keys and values of new tokens into their pages of one layer of the cache; "
    "lengths = starts + counts.",
    (
        Port("keys", FLOAT, KEYS),
        Port("values", FLOAT, VALUES),
        Port("key", FLOAT, "[batch, length, features], heads from feature offsets[0]"),
        Port("value", FLOAT, "[batch, length, features], heads from feature offsets[1]"),
        PAGES,
        Port("starts", ("int64",), "[batch], tokens that each sequence holds already"),
        COUNTS,
    ),
    (
        Port("new_keys", FLOAT, KEYS),
        Port("new_values", FLOAT, VALUES),
        Port("lengths", ("int64",), "[batch]"),
    ),
    {"layer": "int", "offsets": "ints"},
    lines(
        *CONSTANTS,
        *extent("layer_index", "layer"),
        "feature_starts = Constant <value_ints: ints = @offsets> ()",
        "features = Mul(kv_heads, head_dim)",
        "key_start = Slice(feature_starts, none, one)",
        "value_start = Slice(feature_starts, one, two)",
        "key_end = Add(key_start, features)",
        "value_end = Add(value_start, features)",
        "token_shape = Concat <axis: int = 0> (last, kv_heads, head_dim)",
        "key_part = Slice(key, key_start, key_end, last)",
        "value_part = Slice(value, value_start, value_end, last)",
        "key_tokens = Reshape(key_part, token_shape)",
        "value_tokens = Reshape(value_part, token_shape)",
        *positions("key"),
        "row_starts = Unsqueeze(starts, last)",
        "positions = Add(row_starts, numbers)",
        "any_page = Div(positions, page_size)",
        "slot = Mod(positions, page_size)",
        "table_column = Where(real, any_page, none)",
        "page = GatherElements <axis: int = 1> (wide_pages, table_column)",
        "extents = Shape(page)",
        "layers = Expand(layer_index, extents)",
        "layer_column = Reshape(layers, last)",
        "page_column = Reshape(page, last)",
        "slot_column = Reshape(slot, last)",
        "layer_part = Unsqueeze(layer_column, last)",
        "page_part = Unsqueeze(page_column, last)",
        "slot_part = Unsqueeze(slot_column, last)",
        "places = Concat <axis: int = -1> (layer_part, page_part, slot_part)",
        "flat_real = Reshape(real, last)",
        "found = NonZero(flat_real)",
        "chosen = Reshape(found, last)",
        "chosen_places = Gather <axis: int = 0> (places, chosen)",
        "chosen_keys = Gather <axis: int = 0> (key_tokens, chosen)",
        "chosen_values = Gather <axis: int = 0> (value_tokens, chosen)",
        "keys_by_slot = Transpose <perm: ints = [0, 1, 4, 2, 3]> (keys)",
        "values_by_slot = Transpose <perm: ints = [0, 1, 3, 2, 4]> (values)",
        "written_keys = ScatterND(keys_by_slot, chosen_places, chosen_keys)",
        "written_values = ScatterND(values_by_slot, chosen_places, chosen_values)",
        "new_keys = Transpose <perm: ints = [0, 1, 3, 4, 2]> (written_keys)",
        "new_values = Transpose <perm: ints = [0, 1, 3, 2, 4]> (written_values)",
        "lengths = Add(starts, counts)",
    ),
)

_SOFTCAP = (
    "cap = Constant <value_float: float = @softcap> ()",
    "share = Div(scaled, cap)",
    "bent = Tanh(share)",
    "capped = Mul(bent, cap)",
)


LISTS = Port(
    "selected",
    ("int32",),
    "[batch, lists, ceil(length / block[0]), most], ascending, -1 behind the last",
)


def paged_attention(softcap: bool, selected: bool = False) -> OnnxOperator:
    """The operator of this kind."""
    return OnnxOperator(
        f"PagedAttention{'Softcap' * softcap}{'Selected' * selected}",
        "paged_attention",
        "Causal attention of the newest tokens over a paged cache that holds them already"
        + ("; scores s become softcap * tanh(s / softcap)" if softcap else "")
        + (
            "; only the listed blocks of block[1] pages are seen, "
            "of which those may be left out whose weights are all below exp(-skip); 0 forbids it."
            if selected
            else "."
        ),
        (
            Port("query", FLOAT, "[batch, length, features], heads from feature offset"),
            Port("keys", FLOAT, KEYS),
            Port("values", FLOAT, VALUES),
            PAGES,
            Port("lengths", ("int64",), "[batch], tokens in the cache, new ones included"),
            COUNTS,
            *((LISTS,) if selected else ()),
        ),
        (Port("y", FLOAT, "[batch, length, heads * head_dim]"),),
        {
            "layer": "int",
            "heads": "int",
            "offset": "int",
            "scale": "float",
            "window": "int",
            **({"softcap": "float"} if softcap else {}),
            **({"block": "ints", "skip": "float"} if selected else {}),
        },
        lines(*CONSTANTS, *_gathered(), *_scores(softcap), *_attended(softcap, selected)),
    )


def _gathered() -> tuple[str, ...]:
    """Keys and values of each sequence; what lies behind its end is zero."""
    return (
        "layer_index = Constant <value_int: int = @layer> ()",
        "layer_keys = Gather <axis: int = 0> (keys, layer_index)",
        "layer_values = Gather <axis: int = 0> (values, layer_index)",
        "page_count = Shape <start: int = 1, end: int = 2> (pages)",
        "page_number = Squeeze(page_count)",
        "page_numbers = Range(begin, page_number, step)",
        "page_starts = Mul(page_numbers, page_size)",
        "row_lengths = Unsqueeze(lengths, last)",
        "page_used = Less(page_starts, row_lengths)",
        "safe_pages = Where(page_used, wide_pages, none)",
        "key_pages = Gather <axis: int = 0> (layer_keys, safe_pages)",
        "value_pages = Gather <axis: int = 0> (layer_values, safe_pages)",
        "key_by_head = Transpose <perm: ints = [0, 2, 3, 1, 4]> (key_pages)",
        "value_by_head = Transpose <perm: ints = [0, 2, 1, 3, 4]> (value_pages)",
        "slots = Mul(page_count, page_size)",
        "slot_number = Squeeze(slots)",
        "slot_numbers = Range(begin, slot_number, step)",
        "slot_used = Less(slot_numbers, row_lengths)",
        "key_shape = Concat <axis: int = 0> (none, kv_heads, one, head_dim, slots)",
        "value_shape = Concat <axis: int = 0> (none, kv_heads, one, slots, head_dim)",
        "key_heads = Reshape(key_by_head, key_shape)",
        "any_values = Reshape(value_by_head, value_shape)",
        integer("three", 3),
        integer("four", 4),
        "value_axes = Concat <axis: int = 0> (one, two, four)",
        "value_used = Unsqueeze(slot_used, value_axes)",
        "zero = Constant <value_float: float = 0.0> ()",
        "value_heads = Where(value_used, any_values, zero)",
    )


def query_heads() -> tuple[str, ...]:
    """The query by key head, query head of it, token, feature."""
    return (
        *extent("head_count", "heads"),
        *extent("query_start", "offset"),
        "group_size = Div(head_count, kv_heads)",
        "query_features = Mul(head_count, head_dim)",
        "query_end = Add(query_start, query_features)",
        "query_part = Slice(query, query_start, query_end, last)",
        "query_shape = Concat <axis: int = 0> (none, none, kv_heads, group_size, head_dim)",
        "query_split = Reshape(query_part, query_shape)",
        "query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (query_split)",
    )


def _scores(softcap: bool) -> tuple[str, ...]:
    return (
        *query_heads(),
        "scores = MatMul(query_heads, key_heads)",
        "factor = Constant <value_float: float = @scale> ()",
        "scaled = Mul(scores, factor)",
        *(_SOFTCAP if softcap else ()),
    )


_LISTED = (
    "block_sizes = Constant <value_ints: ints = @block> ()",
    "query_block = Slice(block_sizes, none, one)",
    "page_block = Slice(block_sizes, one, two)",
    "block_slots = Mul(page_block, page_size)",
    "slot_blocks = Div(slot_numbers, block_slots)",
    "token_blocks = Div(numbers, query_block)",
    "wide_selected = Cast <to: int = 7> (selected)",
    "each_selected = Unsqueeze(wide_selected, last)",
    "matches = Equal(each_selected, slot_blocks)",
    "match_numbers = Cast <to: int = 7> (matches)",
    integer("of_entries", 3),
    "found_numbers = ReduceMax <keepdims: int = 0> (match_numbers, of_entries)",
    "of_tokens = Gather <axis: int = 2> (found_numbers, token_blocks)",
    "list_count = Shape <start: int = 1, end: int = 2> (selected)",
    "head_number = Squeeze(head_count)",
    "head_numbers = Range(begin, head_number, step)",
    "spread_lists = Mul(head_numbers, list_count)",
    "list_of_head = Div(spread_lists, head_count)",
    "of_heads = Gather <axis: int = 1> (of_tokens, list_of_head)",
    "listed_shape = Concat <axis: int = 0> (none, kv_heads, group_size, length, slots)",
    "of_groups = Reshape(of_heads, listed_shape)",
    "listed = Cast <to: int = 9> (of_groups)",
    "seen = And(seen_by_place, listed)",
)
"""The slots of listed blocks, by key head, query head of it, token, slot."""


def _attended(softcap: bool, selected: bool) -> tuple[str, ...]:
    """Query ``i`` stands at ``lengths - counts + i``; a window of 0 is none."""
    return (
        *positions("query"),
        "row_starts = Sub(row_lengths, row_counts)",
        "positions = Add(row_starts, numbers)",
        "query_positions = Unsqueeze(positions, last)",
        "behind = Sub(query_positions, slot_numbers)",
        "window_number = Constant <value_int: int = @window> ()",
        "whole = Constant <value_int: int = 9223372036854775807> ()",
        "windowed = Greater(window_number, begin)",
        "reach = Where(windowed, window_number, whole)",
        "not_ahead = GreaterOrEqual(behind, begin)",
        "near = Less(behind, reach)",
        "seen_tokens = And(not_ahead, near)",
        "head_axes = Concat <axis: int = 0> (one, two)",
        f"{'seen_by_place' if selected else 'seen'} = Unsqueeze(seen_tokens, head_axes)",
        *(_LISTED if selected else ()),
        "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
        f"hidden = Where(seen, {'capped' if softcap else 'scaled'}, lowest)",
        "weights = Softmax <axis: int = -1> (hidden)",
        "found = MatMul(weights, value_heads)",
        "tokens = Transpose <perm: ints = [0, 3, 1, 2, 4]> (found)",
        "joined = Concat <axis: int = 0> (none, none, last)",
        "rows = Reshape(tokens, joined)",
        "real_rows = Unsqueeze(real, last)",
        "y = Where(real_rows, rows, zero)",
    )


KINDS = (
    APPEND,
    *(paged_attention(*kind) for kind in product((False, True), repeat=2)),
)
