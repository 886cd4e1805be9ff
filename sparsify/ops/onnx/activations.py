"""Activations in standard operators, in the forms that ONNX Runtime's optimiser knows."""

from __future__ import annotations

from sparsify.ops.linear import ACTIVATIONS
from sparsify.ops.onnx.schema import Step, camel

_STATEMENTS = {
    "relu": ("{y} = Relu({x})",),
    "gelu": (
        "root_two = Constant <value_float: float = 1.4142135623730951> ()",
        "unit = Constant <value_float: float = 1.0> ()",
        "half = Constant <value_float: float = 0.5> ()",
        "scaled = Div({x}, root_two)",
        "error = Erf(scaled)",
        "risen = Add(error, unit)",
        "doubled = Mul({x}, risen)",
        "{y} = Mul(doubled, half)",
    ),
    "gelu_tanh": (
        "third = Constant <value_float: float = 3.0> ()",
        "cubic = Constant <value_float: float = 0.044715> ()",
        "slope = Constant <value_float: float = 0.7978845608028654> ()",
        "unit = Constant <value_float: float = 1.0> ()",
        "half = Constant <value_float: float = 0.5> ()",
        "cube = Pow({x}, third)",
        "bent = Mul(cube, cubic)",
        "inner = Add({x}, bent)",
        "steep = Mul(inner, slope)",
        "turned = Tanh(steep)",
        "risen = Add(turned, unit)",
        "doubled = Mul({x}, risen)",
        "{y} = Mul(doubled, half)",
    ),
    "silu": ("share = Sigmoid({x})", "{y} = Mul({x}, share)"),
    "tanh": ("{y} = Tanh({x})",),
}
assert {"none", *_STATEMENTS} == ACTIVATIONS.keys()


def activate(activation: str) -> Step:
    """The statements that apply an activation other than ``none``."""

    def step(x: str, y: str) -> tuple[str, ...]:
        return tuple(statement.format(x=x, y=y) for statement in _STATEMENTS[activation])

    return step


def suffix(activation: str) -> str:
    """What an operator's name says of its activation."""
    return "" if activation == "none" else camel(activation)
