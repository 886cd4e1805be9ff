"""``route`` in ONNX: ``Route`` and the router's name, one operator for each router of ours.

Attributes are the router's; inputs are the logits and the router's tensors.
"""

from __future__ import annotations

from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, camel, extent, integer, lines
from sparsify.routers import (
    ReluNorm,
    Router,
    SigmoidTopK,
    SoftmaxTopK,
    Temperature,
    Threshold,
    TopK,
    Tree,
)
from sparsify.routers.sigmoid import TINY
from sparsify.routers.tree import LEAST

_ROUTES = (
    Port("experts", ("int32",), "[tokens, slots], -1 where a slot is not used"),
    Port("weights", FLOAT, "[tokens, slots], 0 where a slot is not used"),
)
_ONE = integer("one", 1)
_LAST = integer("last", -1)
_K = (_ONE, *extent("count", "k"))
_EXPERTS = "experts = Cast <to: int = 6> ({0})"
_EVERY = "count = Shape <start: int = 1, end: int = 2> ({0})"


def _router(
    name: str, summary: str, parameters: dict[str, str], attributes: tuple[str, ...], *body: str
) -> OnnxOperator:
    ports = (Port(n, FLOAT, shape, constant=True) for n, shape in parameters.items())
    logits = Port("logits", FLOAT, "[tokens, width]")
    return OnnxOperator(
        f"Route{camel(name)}",
        "route",
        summary,
        (logits, *ports),
        _ROUTES,
        dict.fromkeys(attributes, "int"),
        lines(*body),
    )


def _used(order: str, weights: str) -> tuple[str, ...]:
    """Slots that are ``chosen`` keep their expert and weight."""
    return (
        integer("unused", -1),
        "nothing = Constant <value_float: float = 0.0> ()",
        f"kept = Where(chosen, {order}, unused)",
        _EXPERTS.format("kept"),
        f"weights = Where(chosen, {weights}, nothing)",
    )


def _first(of: str) -> tuple[str, ...]:
    """Which slot is the first."""
    return (
        integer("none", 0),
        "begin = Constant <value_int: int = 0> ()",
        "step = Constant <value_int: int = 1> ()",
        f"extent = Shape <start: int = 1, end: int = 2> ({of})",
        "number = Squeeze(extent)",
        "numbers = Range(begin, number, step)",
        "first = Equal(numbers, none)",
    )


TOP_K = _router(
    "top_k",
    "The k experts with the largest logits, weights one.",
    {},
    ("k",),
    *_K,
    "values, order = TopK <axis: int = -1> (logits, count)",
    _EXPERTS.format("order"),
    "shape = Shape(order)",
    "weights = ConstantOfShape <value: tensor = float[1] {1.0}> (shape)",
)


def softmax_top_k(normalise: bool) -> OnnxOperator:
    """The router with weights that add up to one, or not."""
    best = "weights" if not normalise else "best"
    return _router(
        f"softmax_top_k{'_normalised' * normalise}",
        "The k most probable experts, weighted by their probability"
        + (" over the sum of them." if normalise else "."),
        {},
        ("k",),
        *_K,
        "shares = Softmax <axis: int = -1> (logits)",
        f"{best}, order = TopK <axis: int = -1> (shares, count)",
        _EXPERTS.format("order"),
        *(
            (_LAST, "total = ReduceSum(best, last)", "weights = Div(best, total)")
            if normalise
            else ()
        ),
    )


_GROUPS = (
    integer("same", 0),
    integer("two", 2),
    *extent("parts", "groups"),
    *extent("number_kept", "kept"),
    "part_shape = Concat <axis: int = 0> (same, parts, last)",
    "grouped = Reshape(every_key, part_shape)",
    "size = Shape <start: int = 2, end: int = 3> (grouped)",
    "pair = Min(size, two)",
    "pair_values, pair_order = TopK <axis: int = -1> (grouped, pair)",
    "worth = ReduceSum <keepdims: int = 0> (pair_values, last)",
    "group_values, group_order = TopK <axis: int = -1> (worth, number_kept)",
    "worth_shape = Shape(worth)",
    "no_group = ConstantOfShape <value: tensor = int64[1] {0}> (worth_shape)",
    "order_shape = Shape(group_order)",
    "marks = Expand(one, order_shape)",
    "marked = ScatterElements <axis: int = 1> (no_group, group_order, marks)",
    "group_kept = Equal(marked, one)",
    "wide_kept = Unsqueeze(group_kept, last)",
    "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
    "hidden = Where(wide_kept, grouped, lowest)",
    "flat_shape = Concat <axis: int = 0> (same, last)",
    "keys = Reshape(hidden, flat_shape)",
)


def sigmoid_top_k(normalise: bool, grouped: bool) -> OnnxOperator:
    """The router with weights that are divided by their sum, or not, and with groups, or not."""
    return _router(
        f"sigmoid_top_k{'_normalised' * normalise}{'_grouped' * grouped}",
        "The k best experts by sigmoid(logits) + bias, weighted by sigmoid(logits) * scale"
        + (" over the sum of them" if normalise else "")
        + ("; of the best groups only." if grouped else "."),
        {"bias": "[experts]", "scale": "[1]"},
        ("k", *(("groups", "kept") if grouped else ())),
        *_K,
        _LAST,
        "scores = Sigmoid(logits)",
        f"{'every_key' if grouped else 'keys'} = Add(scores, bias)",
        *(_GROUPS if grouped else ()),
        "best, order = TopK <axis: int = -1> (keys, count)",
        _EXPERTS.format("order"),
        "raw = GatherElements <axis: int = 1> (scores, order)",
        *(
            (
                "sum = ReduceSum(raw, last)",
                f"tiny = Constant <value_float: float = {TINY}> ()",
                "total = Add(sum, tiny)",
                "share = Div(raw, total)",
                "weights = Mul(share, scale)",
            )
            if normalise
            else ("weights = Mul(raw, scale)",)
        ),
    )


THRESHOLD = _router(
    "threshold",
    "The most probable experts while those before have less than the threshold together.",
    {"threshold": "[1]"},
    ("slots",),
    _ONE,
    *extent("count", "slots"),
    "axis = Constant <value_int: int = 1> ()",
    "shares = Softmax <axis: int = -1> (logits)",
    "best, order = TopK <axis: int = -1> (shares, count)",
    "before = CumSum <exclusive: int = 1> (best, axis)",
    "short = Less(before, threshold)",
    *_first("best"),
    "chosen = Or(short, first)",
    *_used("order", "best"),
)

TEMPERATURE = _router(
    "temperature",
    "Every expert whose softmax(logits / temperature) exceeds the threshold, and the largest.",
    {"temperature": "[1]", "threshold": "[1]"},
    (),
    _EVERY.format("logits"),
    "cooled = Div(logits, temperature)",
    "shares = Softmax <axis: int = -1> (cooled)",
    "best, order = TopK <axis: int = -1> (shares, count)",
    "large = Greater(best, threshold)",
    *_first("best"),
    "chosen = Or(large, first)",
    *_used("order", "best"),
)

RELU_NORM = _router(
    "relu_norm",
    "Every expert with a positive logit, weighted by the root-mean-square norm of relu(logits).",
    {"weight": "[experts]", "epsilon": "[1]"},
    (),
    _LAST,
    _EVERY.format("logits"),
    "nothing_left = Constant <value_float: float = 0.0> ()",
    "positive = Relu(logits)",
    "squares = Mul(positive, positive)",
    "mean = ReduceMean(squares, last)",
    "risen = Add(mean, epsilon)",
    "deviation = Sqrt(risen)",
    "normal = Div(positive, deviation)",
    "scaled = Mul(normal, weight)",
    "best, order = TopK <axis: int = -1> (positive, count)",
    "ordered = GatherElements <axis: int = 1> (scaled, order)",
    "chosen = Greater(best, nothing_left)",
    *_used("order", "ordered"),
)

TREE = _router(
    "tree",
    "Experts at the leaves of soft decision trees, weighted by reaching them and their scores.",
    {"gamma": "[1]"},
    ("trees", "levels"),
    _ONE,
    _LAST,
    integer("none", 0),
    integer("two", 2),
    integer("same", 0),
    *extent("tree_count", "trees"),
    "level_number = Constant <value_int: int = @levels> ()",
    "begin = Constant <value_int: int = 0> ()",
    "step = Constant <value_int: int = 1> ()",
    "base_two = Constant <value_int: int = 2> ()",
    "leaf_number = Pow(base_two, level_number)",
    "leaf_count = Reshape(leaf_number, one)",
    "decision_count = Sub(leaf_count, one)",
    "part_shape = Concat <axis: int = 0> (same, tree_count, last)",
    "parts = Reshape(logits, part_shape)",
    "behind = Shape <start: int = 2, end: int = 3> (parts)",
    "decisions = Slice(parts, none, decision_count, last)",
    "scores = Slice(parts, decision_count, behind, last)",
    # The smooth step of each decision.
    "low = Constant <value_float: float = -0.5> ()",
    "half = Constant <value_float: float = 0.5> ()",
    "unit = Constant <value_float: float = 1.0> ()",
    "slope = Constant <value_float: float = 1.5> ()",
    "cubic = Constant <value_float: float = -2.0> ()",
    "ratio = Div(decisions, gamma)",
    "u = Clip(ratio, low, half)",
    "square = Mul(u, u)",
    "cube = Mul(square, u)",
    "bent = Mul(cube, cubic)",
    "straight = Mul(u, slope)",
    "curve = Add(bent, straight)",
    "left = Add(curve, half)",
    "right = Sub(unit, left)",
    # On each level, the decision on a leaf's way and the side on which the way goes on.
    "level = Range(begin, level_number, step)",
    "leaf = Range(begin, leaf_number, step)",
    "level_column = Unsqueeze(level, last)",
    "power = Pow(two, level_column)",
    "below = Div(leaf_count, power)",
    "half_below = Div(below, two)",
    "turns = Div(leaf, below)",
    "earlier = Sub(power, one)",
    "node = Add(earlier, turns)",
    "side = Div(leaf, half_below)",
    "parity = Mod(side, two)",
    "goes_right = Equal(parity, one)",
    "left_ways = Gather <axis: int = 2> (left, node)",
    "right_ways = Gather <axis: int = 2> (right, node)",
    "ways = Where(goes_right, right_ways, left_ways)",
    "reached = ReduceProd <keepdims: int = 0> (ways, two)",
    # Softmax of the scores that are reached.
    "nothing_reached = Constant <value_float: float = 0.0> ()",
    "lowest = Constant <value_float: float = -3.4028234663852886e38> ()",
    "is_reached = Greater(reached, nothing_reached)",
    "seen = Where(is_reached, scores, lowest)",
    "both_axes = Constant <value_ints: ints = [1, 2]> ()",
    "most = ReduceMax(seen, both_axes)",
    "shifted = Sub(seen, most)",
    "powers = Exp(shifted)",
    "worth = Mul(reached, powers)",
    "every_gate = ReduceSum <keepdims: int = 0> (worth, one)",
    "largest = ReduceMax(every_gate, last)",
    f"least = Constant <value_float: float = {LEAST}> ()",
    "floor = Mul(largest, least)",
    "counts = Greater(every_gate, floor)",
    "gates = Where(counts, every_gate, nothing_reached)",
    "total = ReduceSum(gates, last)",
    "shares = Div(gates, total)",
    "best, order = TopK <axis: int = -1> (shares, leaf_count)",
    "chosen = Greater(best, nothing_reached)",
    *_used("order", "best"),
)


def operator_of(router: Router, width: int) -> tuple[OnnxOperator, dict[str, int]]:
    """The operator of a router on so many logits, and its attributes.

    Raises:
        LookupError: the router is none of ours.
    """
    count = router.experts(width)
    match router:
        case TopK():
            return TOP_K, {"k": router.k}
        case SoftmaxTopK():
            return softmax_top_k(bool(router.normalise)), {"k": router.k}
        case SigmoidTopK():
            grouped = router.groups > 1
            parts = {"groups": router.groups, "kept": router.kept} if grouped else {}
            return sigmoid_top_k(bool(router.normalise), grouped), {"k": router.k, **parts}
        case Threshold():
            return THRESHOLD, {"slots": router.slots(count)}
        case Temperature():
            return TEMPERATURE, {}
        case ReluNorm():
            return RELU_NORM, {}
        case Tree():
            return TREE, {"trees": router.trees, "levels": count.bit_length() - 1}
    raise LookupError(
        f"router {router.spec} has no operator in the domain; compile the model, or export it with "
        "a router that has one"
    )


KINDS = (
    TOP_K,
    *(softmax_top_k(normalise) for normalise in (False, True)),
    *(
        sigmoid_top_k(normalise, grouped)
        for normalise in (False, True)
        for grouped in (False, True)
    ),
    THRESHOLD,
    TEMPERATURE,
    RELU_NORM,
    TREE,
)
