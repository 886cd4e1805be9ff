"""``route`` in ONNX: ``Route`` and the router's name, one operator for each router of ours.

Attributes are the router's; inputs are the logits and the router's tensors.
"""

from __future__ import annotations

from sparsify.ops.onnx.route_parts import (
    EVERY,
    EXPERTS,
    LAST,
    ONE,
    K,
    first_slot,
    router_operator,
    used_slots,
)
from sparsify.ops.onnx.route_tree import TREE
from sparsify.ops.onnx.schema import OnnxOperator, extent, integer
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

TOP_K = router_operator(
    "top_k",
    "The k experts with the largest logits, weights one.",
    {},
    ("k",),
    *K,
    "values, order = TopK <axis: int = -1> (logits, count)",
    EXPERTS.format("order"),
    "shape = Shape(order)",
    "weights = ConstantOfShape <value: tensor = float[1] {1.0}> (shape)",
)


def softmax_top_k(normalise: bool) -> OnnxOperator:
    """The router with weights that add up to one, or not."""
    best = "weights" if not normalise else "best"
    return router_operator(
        f"softmax_top_k{'_normalised' * normalise}",
        "The k most probable experts, weighted by their probability"
        + (" over the sum of them." if normalise else "."),
        {},
        ("k",),
        *K,
        "shares = Softmax <axis: int = -1> (logits)",
        f"{best}, order = TopK <axis: int = -1> (shares, count)",
        EXPERTS.format("order"),
        *(
            (LAST, "total = ReduceSum(best, last)", "weights = Div(best, total)")
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
    return router_operator(
        f"sigmoid_top_k{'_normalised' * normalise}{'_grouped' * grouped}",
        "The k best experts by sigmoid(logits) + bias, weighted by sigmoid(logits) * scale"
        + (" over the sum of them" if normalise else "")
        + ("; of the best groups only." if grouped else "."),
        {"bias": "[experts]", "scale": "[1]"},
        ("k", *(("groups", "kept") if grouped else ())),
        *K,
        LAST,
        "scores = Sigmoid(logits)",
        f"{'every_key' if grouped else 'keys'} = Add(scores, bias)",
        *(_GROUPS if grouped else ()),
        "best, order = TopK <axis: int = -1> (keys, count)",
        EXPERTS.format("order"),
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


THRESHOLD = router_operator(
    "threshold",
    "The most probable experts while those before have less than the threshold together.",
    {"threshold": "[1]"},
    ("slots",),
    ONE,
    *extent("count", "slots"),
    "axis = Constant <value_int: int = 1> ()",
    "shares = Softmax <axis: int = -1> (logits)",
    "best, order = TopK <axis: int = -1> (shares, count)",
    "before = CumSum <exclusive: int = 1> (best, axis)",
    "short = Less(before, threshold)",
    *first_slot("best"),
    "chosen = Or(short, first)",
    *used_slots("order", "best"),
)

TEMPERATURE = router_operator(
    "temperature",
    "Every expert whose softmax(logits / temperature) exceeds the threshold, and the largest.",
    {"temperature": "[1]", "threshold": "[1]"},
    (),
    EVERY.format("logits"),
    "cooled = Div(logits, temperature)",
    "shares = Softmax <axis: int = -1> (cooled)",
    "best, order = TopK <axis: int = -1> (shares, count)",
    "large = Greater(best, threshold)",
    *first_slot("best"),
    "chosen = Or(large, first)",
    *used_slots("order", "best"),
)

RELU_NORM = router_operator(
    "relu_norm",
    "Every expert with a positive logit, weighted by the root-mean-square norm of relu(logits).",
    {"weight": "[experts]", "epsilon": "[1]"},
    (),
    LAST,
    EVERY.format("logits"),
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
    *used_slots("order", "ordered"),
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
