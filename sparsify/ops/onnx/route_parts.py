"""What the bodies of routers share: inputs and results, the slots that are used, constants."""

from __future__ import annotations

from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, camel, extent, integer, lines

ROUTES = (
    Port("experts", ("int32",), "[tokens, slots], -1 where a slot is not used"),
    Port("weights", FLOAT, "[tokens, slots], 0 where a slot is not used"),
)
ONE = integer("one", 1)
LAST = integer("last", -1)
K = (ONE, *extent("count", "k"))
EXPERTS = "experts = Cast <to: int = 6> ({0})"
EVERY = "count = Shape <start: int = 1, end: int = 2> ({0})"


def router_operator(
    name: str, summary: str, parameters: dict[str, str], attributes: tuple[str, ...], *body: str
) -> OnnxOperator:
    ports = (Port(n, FLOAT, shape, constant=True) for n, shape in parameters.items())
    logits = Port("logits", FLOAT, "[tokens, width]")
    return OnnxOperator(
        f"Route{camel(name)}",
        "route",
        summary,
        (logits, *ports),
        ROUTES,
        dict.fromkeys(attributes, "int"),
        lines(*body),
    )


def used_slots(order: str, weights: str) -> tuple[str, ...]:
    """Slots that are ``chosen`` keep their expert and weight."""
    return (
        integer("unused", -1),
        "nothing = Constant <value_float: float = 0.0> ()",
        f"kept = Where(chosen, {order}, unused)",
        EXPERTS.format("kept"),
        f"weights = Where(chosen, {weights}, nothing)",
    )


def first_slot(of: str) -> tuple[str, ...]:
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
