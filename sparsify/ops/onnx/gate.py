"""``gate`` in ONNX: ``GateThreshold``, ``GateTopK``, ... one operator for each rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsify.gates import (
    ChannelThreshold,
    Gate,
    StatisticalTopK,
    Threshold,
    TopK,
    WeightedTopK,
    parse,
)
from sparsify.ops.onnx.schema import (
    FLOAT,
    AttributeType,
    OnnxOperator,
    Port,
    camel,
    extent,
    integer,
    lines,
)


@dataclass(frozen=True)
class GateBody:
    """A rule in ONNX.

    Attributes:
        attributes: the operator's attributes, by the gate and the number of features.
    """

    operator: OnnxOperator
    attributes: Callable[[Any, int], dict[str, Any]]


def gate_operator(
    kind: type[Gate],
    summary: str,
    shapes: tuple[str, ...],
    attributes: dict[str, AttributeType],
    *dropped: str,
) -> OnnxOperator:
    """The operator of a rule.

    Args:
        shapes: of its parameters.
        dropped: statements that compute ``dropped``, whether a feature becomes zero, from ``x``,
            the parameters and the attributes.
    """
    parameters = zip(kind.parameters, shapes, strict=True)
    return OnnxOperator(
        f"Gate{camel(kind.name)}",
        "gate",
        f"y = x where a feature is kept, else 0: {summary}.",
        (
            Port("x", FLOAT, "[..., features]"),
            *(Port(name, FLOAT, shape, constant=True) for name, shape in parameters),
        ),
        (Port("y", FLOAT, "[..., features]"),),
        attributes,
        lines(
            *dropped, "zero = Constant <value_float: float = 0.0> ()", "y = Where(dropped, zero, x)"
        ),
    )


def _no_attributes(gate: Any, features: int) -> dict[str, Any]:
    return {}


def _count(gate: Any, features: int) -> dict[str, Any]:
    return {"k": gate.k}


def _quantile(gate: StatisticalTopK, features: int) -> dict[str, Any]:
    return {"quantile": gate.quantile(features)}


_BELOW_THE_LAST = (
    integer("one", 1),
    integer("axis", -1),
    *extent("count", "k"),
    "largest, places = TopK <axis: int = -1, largest: int = 1, sorted: int = 0> (scores, count)",
    "last = ReduceMin <keepdims: int = 1> (largest, axis)",
    "dropped = Less(scores, last)",
)

BODIES: dict[str, GateBody] = {
    Threshold.name: GateBody(
        gate_operator(
            Threshold,
            "magnitudes above one threshold",
            ("[1]",),
            {},
            "magnitude = Abs(x)",
            "dropped = LessOrEqual(magnitude, threshold)",
        ),
        _no_attributes,
    ),
    ChannelThreshold.name: GateBody(
        gate_operator(
            ChannelThreshold,
            "magnitudes above a threshold for each feature",
            ("[features]",),
            {},
            "magnitude = Abs(x)",
            "dropped = LessOrEqual(magnitude, thresholds)",
        ),
        _no_attributes,
    ),
    TopK.name: GateBody(
        gate_operator(
            TopK, "the k largest magnitudes", (), {"k": "int"}, "scores = Abs(x)", *_BELOW_THE_LAST
        ),
        _count,
    ),
    WeightedTopK.name: GateBody(
        gate_operator(
            WeightedTopK,
            "the k largest magnitudes times importance",
            ("[features]",),
            {"k": "int"},
            "magnitude = Abs(x)",
            "scores = Mul(magnitude, importance)",
            *_BELOW_THE_LAST,
        ),
        _count,
    ),
    StatisticalTopK.name: GateBody(
        gate_operator(
            StatisticalTopK,
            "values that lie quantile standard deviations above the mean",
            (),
            {"quantile": "float"},
            integer("one", 1),
            integer("axis", -1),
            "mean = ReduceMean <keepdims: int = 1> (x, axis)",
            "centred = Sub(x, mean)",
            "squares = Mul(centred, centred)",
            "total = ReduceSum <keepdims: int = 1> (squares, axis)",
            "shape = Shape(x)",
            "features = Gather <axis: int = 0> (shape, axis)",
            "others = Sub(features, one)",
            "divisor = Max(others, one)",
            "degrees = CastLike(divisor, x)",
            "variance = Div(total, degrees)",
            "deviation = Sqrt(variance)",
            "factor = Constant <value_float: float = @quantile> ()",
            "distance = Mul(deviation, factor)",
            "threshold = Add(mean, distance)",
            "dropped = LessOrEqual(x, threshold)",
        ),
        _quantile,
    ),
}
"""The rules that can be exported, by their names."""


def gate(rule: str, features: int) -> tuple[OnnxOperator, dict[str, Any]]:
    """The operator of a rule, and its attributes.

    Raises:
        ValueError: the rule has no function body.
    """
    found = parse(rule)
    if found.name not in BODIES:
        raise ValueError(
            f"gate {found.spec}: has no ONNX function body; give BODIES of sparsify.ops.onnx.gate "
            f"one, as {', '.join(BODIES)} have"
        )
    body = BODIES[found.name]
    return body.operator, body.attributes(found, features)


KINDS = tuple(body.operator for body in BODIES.values())
