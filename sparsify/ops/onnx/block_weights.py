"""How blocks are weighed in ONNX: the members of ``SelectBlocks``, those of the kernel family."""

from __future__ import annotations

from sparsify.ops.onnx.block_divergence import DIVERGENCE
from sparsify.ops.onnx.head_patterns import HEAD_PATTERNS

_KEYS_OF_SEQUENCE = (
    "table_page_used = Mul(page_numbers, page_size)",
    "page_used = Less(table_page_used, row_lengths)",
    "safe_pages = Where(page_used, wide_pages, none)",
    "key_pages = Gather <axis: int = 0> (layer_keys, safe_pages)",
    "key_by_head = Transpose <perm: ints = [0, 2, 1, 4, 3]> (key_pages)",
    "token_shape = Concat <axis: int = 0> (none, none, slots, head_dim)",
    "any_tokens = Reshape(key_by_head, token_shape)",
    "slot_number = Squeeze(slots)",
    "slot_numbers = Range(begin, slot_number, step)",
    "slot_used = Less(slot_numbers, row_lengths)",
    "slot_axes = Concat <axis: int = 0> (one, three)",
    "token_used = Unsqueeze(slot_used, slot_axes)",
    "key_tokens = Where(token_used, any_tokens, nothing)",
)

_POOLED = (
    "token_padding = Concat <axis: int = 0> (none, none, none, none, none, none, missing_slots, "
    "none)",
    "padded_keys = Pad(key_tokens, token_padding, nothing)",
    "block_shape = Concat <axis: int = 0> (none, none, columns, key_block, head_dim)",
    "block_keys = Reshape(padded_keys, block_shape)",
    "key_sums = ReduceSum <keepdims: int = 0> (block_keys, three)",
    "column_firsts = Mul(column_numbers, key_block)",
    "behind_column = Sub(row_lengths, column_firsts)",
    "held_most = Min(behind_column, key_block)",
    "held = Max(held_most, one)",
    "held_number = Cast <to: int = 1> (held)",
    "held_axes = Concat <axis: int = 0> (one, three)",
    "held_keys = Unsqueeze(held_number, held_axes)",
    "mean_keys = Div(key_sums, held_keys)",
    "mean_columns = Transpose <perm: ints = [0, 1, 3, 2]> (mean_keys)",
    "group_columns = Unsqueeze(mean_columns, two)",
    "real_axes = Constant <value_ints: ints = [1, 2, 4]> ()",
    "real_queries = Unsqueeze(real, real_axes)",
    "only_real = Where(real_queries, query_heads, nothing)",
    "all_queries = Mul(rows, query_block)",
    "missing_queries = Sub(all_queries, length)",
    "no_padding = Constant <value_ints: ints = [0, 0, 0, 0, 0, 0, 0, 0]> ()",
    "query_padding = Concat <axis: int = 0> (no_padding, missing_queries, none)",
    "padded_queries = Pad(only_real, query_padding, nothing)",
    "row_shape = Concat <axis: int = 0> (none, none, none, rows, query_block, head_dim)",
    "row_queries = Reshape(padded_queries, row_shape)",
    "query_sums = ReduceSum <keepdims: int = 0> (row_queries, four)",
    "at_least_one = Max(row_reals, one)",
    "real_number = Cast <to: int = 1> (at_least_one)",
    "real_rows = Unsqueeze(real_number, real_axes)",
    "mean_queries = Div(query_sums, real_rows)",
)

_PLAIN = ("gated_queries = Identity(mean_queries)",)
_GATED = (
    "gate_shape = Concat <axis: int = 0> (kv_heads, group_size, head_dim, head_dim)",
    "head_gates = Reshape(gates, gate_shape)",
    "gated_queries = MatMul(mean_queries, head_gates)",
)
_POOLED_WEIGHTS = (
    "products = MatMul(gated_queries, group_columns)",
    "scores = Mul(products, factor)",
    "seen_scores = Where(visible, scores, lowest)",
    "mean_weights = Softmax <axis: int = -1> (seen_scores)",
)

_LINES = (
    "sixteen = Constant <value_int: int = 16> ()",
    "latest_numbers = Range(begin, sixteen, step)",
    "before_latest = Sub(row_counts, sixteen)",
    "latest_places = Add(before_latest, latest_numbers)",
    "latest_real = GreaterOrEqual(latest_places, none)",
    "safe_places = Max(latest_places, none)",
    "place_axes = Constant <value_ints: ints = [1, 2, 4]> ()",
    "each_place = Unsqueeze(safe_places, place_axes)",
    "sixteen_places = Reshape(sixteen, one)",
    "latest_shape = Concat <axis: int = 0> (batch, kv_heads, group_size, sixteen_places, head_dim)",
    "place_index = Expand(each_place, latest_shape)",
    "latest = GatherElements <axis: int = 3> (query_heads, place_index)",
    "key_columns = Transpose <perm: ints = [0, 1, 3, 2]> (key_tokens)",
    "group_keys = Unsqueeze(key_columns, two)",
    "latest_products = MatMul(latest, group_keys)",
    "latest_scores = Mul(latest_products, factor)",
    "latest_starts = Sub(row_lengths, sixteen)",
    "latest_positions = Add(latest_starts, latest_numbers)",
    "each_position = Unsqueeze(latest_positions, last)",
    "slot_seen = LessOrEqual(slot_numbers, each_position)",
    "group_seen = Unsqueeze(slot_seen, head_axes)",
    "seen_latest = Where(group_seen, latest_scores, lowest)",
    "any_attention = Softmax <axis: int = -1> (seen_latest)",
    "each_real = Unsqueeze(latest_real, place_axes)",
    "attention = Where(each_real, any_attention, nothing)",
    "slot_sums = ReduceSum <keepdims: int = 0> (attention, three)",
    "slot_padding = Concat <axis: int = 0> (none, none, none, none, none, none, none, "
    "missing_slots)",
    "padded_sums = Pad(slot_sums, slot_padding, nothing)",
    "sum_shape = Concat <axis: int = 0> (none, none, none, columns, key_block)",
    "block_sums = Reshape(padded_sums, sum_shape)",
    "found = ReduceSum <keepdims: int = 0> (block_sums, last)",
    "last_key = Sub(key_block, one)",
    "keys_up = Add(row_lengths, last_key)",
    "all_blocks = Div(keys_up, key_block)",
    "distance = Sub(all_blocks, block_counts)",
    "each_distance = Unsqueeze(distance, last)",
    "any_ahead = Add(column_numbers, each_distance)",
    "last_column = Sub(columns, one)",
    "ahead_place = Min(any_ahead, last_column)",
    "ahead_of_heads = Unsqueeze(ahead_place, head_axes)",
    "ahead_index = Expand(ahead_of_heads, plane_shape)",
    "each_row_found = Unsqueeze(found, three)",
    "row_found = Expand(each_row_found, plane_shape)",
    "found_ahead = GatherElements <axis: int = 4> (row_found, ahead_index)",
    "both_found = Add(row_found, found_ahead)",
    "line_weights = Where(visible, both_found, nothing)",
)

_PLANE = (
    "batch = Shape <start: int = 0, end: int = 1> (pages)",
    "plane_shape = Concat <axis: int = 0> (batch, kv_heads, group_size, rows, columns)",
)
_NEARNESS = (
    "unit = Constant <value_float: float = 1.0> ()",
    "any_distance = Sub(blocks, column_numbers)",
    "safe_distance = Max(any_distance, one)",
    "distance_number = Cast <to: int = 1> (safe_distance)",
    "each_nearness = Div(unit, distance_number)",
    "nearness_of_heads = Unsqueeze(each_nearness, head_axes)",
    "seen_nearness = Where(visible, nearness_of_heads, nothing)",
    "near_weights = Expand(seen_nearness, plane_shape)",
)


def weights_of(scoring: str, gated: bool) -> tuple[str, ...]:
    """``weights`` by key head, query head of it, block of queries, block of keys; 0 where hidden.

    Args:
        gated: whether there are ``gates``.
    """
    pooled = (*_POOLED, *(_GATED if gated else _PLAIN), *_POOLED_WEIGHTS)
    lines = (*_PLANE, *_LINES)
    return {
        "pooled": (*_KEYS_OF_SEQUENCE, *pooled, "weights = Identity(mean_weights)"),
        "lines": (*_KEYS_OF_SEQUENCE, *lines, "weights = Identity(line_weights)"),
        "nearness": (*_PLANE, *_NEARNESS, "weights = Identity(near_weights)"),
        "query_aware": (*_KEYS_OF_SEQUENCE, *pooled, *lines, *DIVERGENCE),
        "head_patterns": (*_KEYS_OF_SEQUENCE, *pooled, *lines, *_NEARNESS, *HEAD_PATTERNS),
    }[scoring]
