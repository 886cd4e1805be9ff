"""``select_blocks`` in ONNX: ``SelectBlocks`` by selector."""

from __future__ import annotations

from sparsify.ops.block_selection import DENSITY_STEPS
from sparsify.ops.onnx.block_weights import weights_of
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


_PORTS = {
    "gates": Port("gates", FLOAT, "[heads, head_dim, head_dim]"),
    "patterns": Port("patterns", ("int32",), "[heads]"),
}


def select_blocks(selector: str) -> OnnxOperator:
    """The operator of the block selector with this spec.

    Raises:
        ValueError: it has none.
    """
    return _of(type(block_selector(selector)))


def _of(chosen_by: type[BlockSelector]) -> OnnxOperator:
    scoring = scoring_of(chosen_by)
    return OnnxOperator(
        f"SelectBlocks{camel(chosen_by.name)}",
        "select_blocks",
        "The blocks of block[1] pages that each block of block[0] of the newest tokens reads, for "
        "each query head: the first sinks, the latest recent, and those of most weight, until "
        "density of all are read, or blocks with mass of the weight (0: the density alone).",
        (
            Port("query", FLOAT, "[batch, length, features], heads from feature offset"),
            Port("keys", FLOAT, KEYS),
            *(_PORTS[name] for name in chosen_by.tensors),
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
            *weights_of(scoring, "gates" in chosen_by.tensors),
            *_CHOICE,
        ),
    )


KINDS = tuple(
    _of(selector) for selector in BLOCK_SELECTORS.classes() if selector.scoring is not None
)
