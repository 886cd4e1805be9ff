"""``gated`` in ONNX: ``Gated[activation]``."""

from __future__ import annotations

from sparsify.ops.linear import ACTIVATIONS
from sparsify.ops.onnx.activations import activate, suffix
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, lines


def gated(activation: str) -> OnnxOperator:
    """The operator of this activation."""
    gate = "gate" if activation == "none" else "open"
    return OnnxOperator(
        f"Gated{suffix(activation)}",
        "gated",
        f"y = {activation}(gate) * up; the gate is the first half of the features, up the second.",
        (Port("x", FLOAT, "[..., 2 * features]"),),
        (Port("y", FLOAT, "[..., features]"),),
        {"activation": "string"},
        lines(
            "gate, up = Split <axis: int = -1, num_outputs: int = 2> (x)",
            *(() if activation == "none" else activate(activation)("gate", "open")),
            f"y = Mul({gate}, up)",
        ),
    )


KINDS = tuple(map(gated, ACTIVATIONS))
