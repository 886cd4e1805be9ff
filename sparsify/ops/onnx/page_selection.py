"""``page_bounds`` and ``select_pages`` in ONNX: ``PageBounds``, ``SelectPages`` by selector."""

from __future__ import annotations

from sparsify.ops.onnx.kv_cache import (
    CONSTANTS,
    COUNTS,
    KEYS,
    PAGES,
    positions,
    query_heads,
)
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, camel, extent, integer, lines
from sparsify.selectors import PAGE_SELECTORS, BlockSelector, PageSelector, page_selector

LENGTHS = Port("lengths", ("int64",), "[batch], tokens in the cache, new ones included")
_BOUNDS = "[layers, pages, kv_heads, 2, head_dim, parts]"

TABLE = (
    "page_count = Shape <start: int = 1, end: int = 2> (pages)",
    "page_number = Squeeze(page_count)",
    "page_numbers = Range(begin, page_number, step)",
    "row_lengths = Unsqueeze(lengths, last)",
    "layer_number = Constant <value_int: int = @layer> ()",
    "layer_keys = Gather <axis: int = 0> (keys, layer_number)",
)
"""What `CONSTANTS` of the cache says of values, which these operators do not take."""
HEAD_DIM = "head_dim = Shape <start: int = 3, end: int = 4> (keys)"

BOUNDS = OnnxOperator(
    "PageBounds",
    "page_bounds",
    "Keeps the least and the largest of each feature of the keys of pages that the newest tokens "
    "filled, for each part of a page; y is lengths.",
    (Port("bounds", FLOAT, _BOUNDS), Port("keys", FLOAT, KEYS), PAGES, LENGTHS, COUNTS),
    (Port("new_bounds", FLOAT, _BOUNDS), Port("y", ("int64",), "[batch]")),
    {"layer": "int"},
    lines(
        integer("one", 1),
        integer("last", -1),
        integer("page_size", 16),
        "begin = Constant <value_int: int = 0> ()",
        "step = Constant <value_int: int = 1> ()",
        *TABLE,
        "row_counts = Unsqueeze(counts, last)",
        "row_starts = Sub(row_lengths, row_counts)",
        "first = Div(row_starts, page_size)",
        "end = Div(row_lengths, page_size)",
        "not_before = GreaterOrEqual(page_numbers, first)",
        "not_behind = Less(page_numbers, end)",
        "filled = And(not_before, not_behind)",
        "flat_filled = Reshape(filled, last)",
        "found = NonZero(flat_filled)",
        "chosen = Reshape(found, last)",
        "wide_pages = Cast <to: int = 7> (pages)",
        "flat_pages = Reshape(wide_pages, last)",
        "chosen_pages = Gather <axis: int = 0> (flat_pages, chosen)",
        "page_keys = Gather <axis: int = 0> (layer_keys, chosen_pages)",
        "parts = Shape <start: int = 5, end: int = 6> (bounds)",
        "kept_extents = Constant <value_ints: ints = [0, 0, 0]> ()",
        "slots = Div(page_size, parts)",
        "part_shape = Concat <axis: int = 0> (kept_extents, parts, slots)",
        "part_keys = Reshape(page_keys, part_shape)",
        "least = ReduceMin <keepdims: int = 0> (part_keys, last)",
        "largest = ReduceMax <keepdims: int = 0> (part_keys, last)",
        integer("before_features", -3),
        "least_part = Unsqueeze(least, before_features)",
        "largest_part = Unsqueeze(largest, before_features)",
        "both = Concat <axis: int = -3> (least_part, largest_part)",
        *extent("layer_index", "layer"),
        "extents = Shape(chosen_pages)",
        "layers = Expand(layer_index, extents)",
        "layer_part = Unsqueeze(layers, last)",
        "page_part = Unsqueeze(chosen_pages, last)",
        "places = Concat <axis: int = -1> (layer_part, page_part)",
        "new_bounds = ScatterND(bounds, places, both)",
        "y = Identity(lengths)",
    ),
)

_SCORES = {
    "bounds": (
        "layer_bounds = Gather <axis: int = 0> (bounds, layer_number)",
        "page_bounds = Gather <axis: int = 0> (layer_bounds, safe_pages)",
        "bounds_by_head = Transpose <perm: ints = [0, 2, 1, 3, 4, 5]> (page_bounds)",
        "group_axes = Constant <value_ints: ints = [2, 3]> ()",
        "head_bounds = Unsqueeze(bounds_by_head, group_axes)",
        "page_axes = Constant <value_ints: ints = [4, 5, 7]> ()",
        "wide_query = Unsqueeze(scored_query, page_axes)",
        "each_product = Mul(wide_query, head_bounds)",
        integer("of_bounds", 5),
        "larger = ReduceMax <keepdims: int = 0> (each_product, of_bounds)",
        integer("of_features", 5),
        "part_scores = ReduceSum <keepdims: int = 0> (larger, of_features)",
        "any_scores = ReduceMax <keepdims: int = 0> (part_scores, last)",
    ),
    "products": (
        "key_pages = Gather <axis: int = 0> (layer_keys, safe_pages)",
        "key_by_head = Transpose <perm: ints = [0, 2, 3, 1, 4]> (key_pages)",
        "slots = Mul(page_count, page_size)",
        "key_shape = Concat <axis: int = 0> (none, kv_heads, one, head_dim, slots)",
        "key_heads = Reshape(key_by_head, key_shape)",
        "slot_products = MatMul(scored_query, key_heads)",
        "product_shape = Concat <axis: int = 0> (none, none, none, none, page_count, page_size)",
        "products = Reshape(slot_products, product_shape)",
        "any_scores = ReduceMax <keepdims: int = 0> (products, last)",
    ),
    "order": (
        "places = Cast <to: int = 1> (page_numbers)",
        "order_shape = Concat <axis: int = 0> (one, kv_heads, one, one, page_count)",
        "any_scores = Expand(places, order_shape)",
    ),
}
"""``any_scores``, by key head, query head of it, token, page; anything for pages not full."""

_CHANNELS = (
    "wide_channels = Cast <to: int = 7> (channels)",
    "channel_shape = Shape(channels)",
    "zero = Constant <value_floats: floats = [0.0]> ()",
    "unit = Constant <value_floats: floats = [1.0]> ()",
    "feature_shape = Concat <axis: int = 0> (kv_heads, head_dim)",
    "no_features = Expand(zero, feature_shape)",
    "units = Expand(unit, channel_shape)",
    "feature_mask = ScatterElements <axis: int = 1> (no_features, wide_channels, units)",
    "token_axes = Constant <value_ints: ints = [1, 2]> ()",
    "head_mask = Unsqueeze(feature_mask, token_axes)",
    "scored_query = Mul(query_heads, head_mask)",
)
_PORTS = {
    "bounds": Port("bounds", FLOAT, _BOUNDS),
    "channels": Port("channels", ("int32",), "[kv_heads, chosen]"),
}


def scoring_of(selector: type[PageSelector] | type[BlockSelector]) -> str:
    """The scoring whose function body is a selector's.

    Raises:
        ValueError: it has none.
    """
    if selector.scoring is None:
        raise ValueError(
            f"selector {selector.name}: has no ONNX function body, since it has none of the "
            "kernel family's scorings; export the model without it"
        )
    return selector.scoring


def select_pages(selector: str) -> OnnxOperator:
    """The operator of the page selector with this spec.

    Raises:
        ValueError: it has none.
    """
    return _of(type(page_selector(selector)))


def _of(chosen_by: type[PageSelector]) -> OnnxOperator:
    scoring = scoring_of(chosen_by)
    channels = "channels" in chosen_by.tensors
    return OnnxOperator(
        f"SelectPages{camel(chosen_by.name)}",
        "select_pages",
        "The pages that each of the newest tokens reads, for each key head: the first sinks, the "
        "latest recent, and those whose score is highest, budget in all.",
        (
            Port("query", FLOAT, "[batch, length, features], heads from feature offset"),
            Port("keys", FLOAT, KEYS),
            *(_PORTS[name] for name in chosen_by.tensors),
            PAGES,
            LENGTHS,
            COUNTS,
        ),
        (Port("selected", ("int32",), "[batch, kv_heads, length, budget], -1 behind the last"),),
        {
            "layer": "int",
            "heads": "int",
            "offset": "int",
            "budget": "int",
            "sinks": "int",
            "recent": "int",
        },
        lines(
            *CONSTANTS[:-1],
            HEAD_DIM,
            *TABLE,
            "table_page_used = Mul(page_numbers, page_size)",
            "page_used = Less(table_page_used, row_lengths)",
            "safe_pages = Where(page_used, wide_pages, none)",
            *query_heads(),
            *(_CHANNELS if channels else ("scored_query = Identity(query_heads)",)),
            *_SCORES[scoring],
            *_ranked(),
            *_best(),
        ),
    )


def _ranked() -> tuple[str, ...]:
    """``rank`` by key head, token, page: lowest behind the newest page, highest if always read."""
    return (
        *positions("query"),
        "row_real = Unsqueeze(real, one)",
        "row_starts = Sub(row_lengths, row_counts)",
        "token_positions = Add(row_starts, numbers)",
        "newest_page = Div(token_positions, page_size)",
        "newest = Unsqueeze(newest_page, last)",
        "is_full = Less(page_numbers, newest)",
        "is_held = LessOrEqual(page_numbers, newest)",
        "head_axes = Constant <value_ints: ints = [1, 2]> ()",
        "full_pages = Unsqueeze(is_full, head_axes)",
        "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
        "highest = Constant <value_float: float = 3.4028234663852886e38> ()",
        "scores = Where(full_pages, any_scores, lowest)",
        integer("of_group", 2),
        "best_rank = ReduceMax <keepdims: int = 0> (scores, of_group)",
        *extent("sink_count", "sinks"),
        *extent("recent_count", "recent"),
        "is_sink = Less(page_numbers, sink_count)",
        "latest_old = Sub(newest, recent_count)",
        "is_recent = Greater(page_numbers, latest_old)",
        "is_forced = Or(is_sink, is_recent)",
        "forced = Unsqueeze(is_forced, one)",
        "held = Unsqueeze(is_held, one)",
        "wanted_rank = Where(forced, highest, best_rank)",
        "rank = Where(held, wanted_rank, lowest)",
    )


def _best() -> tuple[str, ...]:
    """The best pages ascending, -1 behind them."""
    return (
        *extent("budget_count", "budget"),
        "most = Min(budget_count, page_count)",
        "ranks, best_pages = TopK <axis: int = -1> (rank, most)",
        "newest_of_heads = Unsqueeze(newest, one)",
        "best_held = LessOrEqual(best_pages, newest_of_heads)",
        "real_tokens = Unsqueeze(row_real, last)",
        "best_real = And(best_held, real_tokens)",
        "known_pages = Where(best_real, best_pages, page_count)",
        "ordered, order = TopK <axis: int = -1, largest: int = 0> (known_pages, most)",
        "is_page = Less(ordered, page_count)",
        "listed = Where(is_page, ordered, last)",
        "missing = Sub(budget_count, most)",
        "no_padding = Constant <value_ints: ints = [0, 0, 0, 0, 0, 0, 0]> ()",
        "padding = Concat <axis: int = 0> (no_padding, missing)",
        "nothing = Constant <value_int: int = -1> ()",
        "padded = Pad(listed, padding, nothing)",
        "selected = Cast <to: int = 6> (padded)",
    )


KINDS = (
    BOUNDS,
    *(_of(selector) for selector in PAGE_SELECTORS.classes() if selector.scoring is not None),
)
