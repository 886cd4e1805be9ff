"""``select_blocks`` in ONNX: ``SelectBlocks`` by selector."""

from __future__ import annotations

from sparsify.ops.block_selection import DENSITY_STEPS
from sparsify.ops.onnx.block_divergence import DIVERGENCE
from sparsify.ops.onnx.kv_cache import CONSTANTS, COUNTS, KEYS, PAGES, positions, query_heads
from sparsify.ops.onnx.page_selection import HEAD_DIM, LENGTHS, TABLE, scoring_of
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, camel, extent, integer, lines
from sparsify.selectors import BLOCK_SELECTORS, BlockSelector, block_selector

_SIZES = (
    integer("three", 3),
    integer("four", 4),
    "head_axes = Constant <value_ints: ints = [1, 2]> ()",
    "nothing = Constant <value_float: float = 0.0> ()",
    "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
    "highest = Constant <value_float: float = 3.4028234663852886e38> ()",
    "factor = Constant <value_float: float = @scale> ()",
    "block_sizes = Constant <value_ints: ints = @block> ()",
    "query_block = Slice(block_sizes, none, one)",
    "page_block = Slice(block_sizes, one, two)",
    "key_block = Mul(page_block, page_size)",
    "last_page = Sub(page_block, one)",
    "pages_up = Add(page_count, last_page)",
    "columns = Div(pages_up, page_block)",
    "column_count = Squeeze(columns)",
    "column_numbers = Range(begin, column_count, step)",
    "last_query = Sub(query_block, one)",
    "queries_up = Add(length, last_query)",
    "rows = Div(queries_up, query_block)",
    "row_count = Squeeze(rows)",
    "row_numbers = Range(begin, row_count, step)",
    "slots = Mul(page_count, page_size)",
    "column_slots = Mul(columns, key_block)",
    "missing_slots = Sub(column_slots, slots)",
)

_ROWS = (
    "row_firsts = Mul(row_numbers, query_block)",
    "behind_first = Sub(row_counts, row_firsts)",
    "at_most = Min(behind_first, query_block)",
    "row_reals = Max(at_most, none)",
    "row_starts = Sub(row_lengths, row_counts)",
    "first_positions = Add(row_starts, row_firsts)",
    "end_positions = Add(first_positions, row_reals)",
    "last_positions = Sub(end_positions, one)",
    "last_blocks = Div(last_positions, key_block)",
    "block_counts = Add(last_blocks, one)",
    "blocks = Unsqueeze(block_counts, last)",
    "is_visible = Less(column_numbers, blocks)",
    "visible = Unsqueeze(is_visible, head_axes)",
)
"""Of each block of queries: its first position, its real queries, the blocks that it may see."""

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
    "batch = Shape <start: int = 0, end: int = 1> (pages)",
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
    "plane_shape = Concat <axis: int = 0> (batch, kv_heads, group_size, rows, columns)",
    "ahead_index = Expand(ahead_of_heads, plane_shape)",
    "each_row_found = Unsqueeze(found, three)",
    "row_found = Expand(each_row_found, plane_shape)",
    "found_ahead = GatherElements <axis: int = 4> (row_found, ahead_index)",
    "both_found = Add(row_found, found_ahead)",
    "line_weights = Where(visible, both_found, nothing)",
)

_CHOICE = (
    *extent("sink_count", "sinks"),
    *extent("recent_count", "recent"),
    "first_blocks = Div(first_positions, key_block)",
    "recent_before = Sub(recent_count, one)",
    "any_near = Sub(first_blocks, recent_before)",
    "near_blocks = Max(any_near, none)",
    "near = Unsqueeze(near_blocks, last)",
    "is_sink = Less(column_numbers, sink_count)",
    "is_near = GreaterOrEqual(column_numbers, near)",
    "is_forced = Or(is_sink, is_near)",
    "forced = Unsqueeze(is_forced, head_axes)",
    "below = Constant <value_float: float = -1.0> ()",
    "wanted = Where(forced, highest, weights)",
    "rank = Where(visible, wanted, below)",
    "density_number = Constant <value_float: float = @density> ()",
    f"density_steps = Constant <value_float: float = {float(DENSITY_STEPS)}> ()",
    "steps_number = Mul(density_number, density_steps)",
    "rounded_steps = Round(steps_number)",
    "steps = Cast <to: int = 7> (rounded_steps)",
    f"half_steps = Constant <value_int: int = {DENSITY_STEPS // 2}> ()",
    f"whole_steps = Constant <value_int: int = {DENSITY_STEPS}> ()",
    "many_steps = Mul(block_counts, steps)",
    "many_and_half = Add(many_steps, half_steps)",
    "share = Div(many_and_half, whole_steps)",
    "forced_far = Sub(block_counts, near_blocks)",
    "forced_all = Add(forced_far, sink_count)",
    "forced_blocks = Min(forced_all, block_counts)",
    "share_or_forced = Max(share, forced_blocks)",
    "density_places = Min(share_or_forced, block_counts)",
    "place_limit = Unsqueeze(density_places, last)",
    "most_places = Unsqueeze(place_limit, head_axes)",
    "least_limit = Unsqueeze(forced_blocks, last)",
    "least_places = Unsqueeze(least_limit, head_axes)",
    "ranks, order = TopK <axis: int = -1> (rank, columns)",
    "ordered_weights = GatherElements <axis: int = -1> (weights, order)",
    "last_axis = Constant <value_int: int = -1> ()",
    "shares = CumSum(ordered_weights, last_axis)",
    "mass = Constant <value_float: float = @mass> ()",
    "whole = ReduceSum <keepdims: int = 1> (weights, last)",
    "mass_wanted = Mul(whole, mass)",
    "too_little = Less(shares, mass_wanted)",
    "little_number = Cast <to: int = 7> (too_little)",
    "little_count = ReduceSum <keepdims: int = 1> (little_number, last)",
    "enough = Add(little_count, one)",
    "enough_or_forced = Max(enough, least_places)",
    "mass_places = Min(enough_or_forced, most_places)",
    "has_mass = Greater(mass, nothing)",
    "places = Where(has_mass, mass_places, most_places)",
    "is_chosen = Less(column_numbers, places)",
    "is_row = Greater(row_reals, none)",
    "row_axes = Constant <value_ints: ints = [1, 2, 4]> ()",
    "real_row = Unsqueeze(is_row, row_axes)",
    "is_kept = And(is_chosen, real_row)",
    "known = Where(is_kept, order, columns)",
    "ordered, ascending = TopK <axis: int = -1, largest: int = 0> (known, columns)",
    "is_block = Less(ordered, columns)",
    "listed = Where(is_block, ordered, last)",
    "list_shape = Concat <axis: int = 0> (none, head_count, rows, columns)",
    "lists = Reshape(listed, list_shape)",
    "selected = Cast <to: int = 6> (lists)",
)


def select_blocks(selector: str) -> OnnxOperator:
    """The operator of the block selector with this spec.

    Raises:
        ValueError: it has none.
    """
    return _of(type(block_selector(selector)))


def _of(chosen_by: type[BlockSelector]) -> OnnxOperator:
    scoring = scoring_of(chosen_by)
    gated = bool(chosen_by.tensors)
    pooled = (*_POOLED, *(_GATED if gated else _PLAIN), *_POOLED_WEIGHTS)
    weights = {
        "pooled": (*pooled, "weights = Identity(mean_weights)"),
        "lines": (*_LINES, "weights = Identity(line_weights)"),
        "query_aware": (*pooled, *_LINES, *DIVERGENCE),
    }
    return OnnxOperator(
        f"SelectBlocks{camel(chosen_by.name)}",
        "select_blocks",
        "The blocks of block[1] pages that each block of block[0] of the newest tokens reads, for "
        "each query head: the first sinks, the latest recent, and those of most weight, until "
        "density of all are read, or blocks with mass of the weight (0: the density alone).",
        (
            Port("query", FLOAT, "[batch, length, features], heads from feature offset"),
            Port("keys", FLOAT, KEYS),
            *((Port("gates", FLOAT, "[heads, head_dim, head_dim]"),) if gated else ()),
            PAGES,
            LENGTHS,
            COUNTS,
        ),
        (
            Port(
                "selected",
                ("int32",),
                "[batch, heads, query_blocks, key_blocks], -1 behind the last",
            ),
        ),
        {
            "layer": "int",
            "heads": "int",
            "offset": "int",
            "scale": "float",
            "block": "ints",
            "density": "float",
            "mass": "float",
            "sinks": "int",
            "recent": "int",
        },
        lines(
            *CONSTANTS[:-1],
            HEAD_DIM,
            *TABLE,
            *query_heads(),
            *positions("query"),
            *_SIZES,
            *_ROWS,
            *_KEYS_OF_SEQUENCE,
            *weights[scoring],
            *_CHOICE,
        ),
    )


KINDS = tuple(
    _of(selector) for selector in BLOCK_SELECTORS.classes() if selector.scoring is not None
)
