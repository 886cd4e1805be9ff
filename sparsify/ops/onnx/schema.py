"""What an operator of the ONNX domain ``sparsify`` is, and the text of its function body.

An ONNX function is found by its name alone and cannot ask whether an input is there, so each kind
of an operator (with a bias or without, one for each activation) is an operator with a name of its
own. None has optional inputs or outputs: the name says exactly what there is. Attributes repeat
what the name says, so that a kernel can serve all kinds of a family and read no name.

Bodies are written in the textual syntax of ONNX and use standard operators of opset 18 alone. What
they make of constants (a dense weight from a packed one) hangs on constants alone, so that a
runtime that folds constants does it once, when it loads the model.

Source: the ONNX IR specification, version 8; the ONNX textual syntax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

DOMAIN = "sparsify"
VERSION = 1
OPSET = 18

AttributeType = Literal["int", "ints", "float", "string"]

Step = Callable[[str, str], tuple[str, ...]]
"""Statements that compute the second name from the first."""

FLOAT = ("float",)
PACKED_VALUES = ("float", "bfloat16")
"""Types of the nonzeros of a packed weight; bfloat16 only where nothing is lost."""


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        types: element types that are allowed, as ONNX spells them.
        shape: the shape in terms of the attributes and of the other ports.
        constant: always an initializer, which a kernel may repack when it is made.
    """

    name: str
    types: tuple[str, ...]
    shape: str
    constant: bool = False


@dataclass(frozen=True)
class OnnxOperator:
    """One operator of the domain: a family's member of one kind.

    Attributes:
        family: name of the operator of ``torch.ops.sparsify`` that it stands for.
        attributes: type of each; all are required.
        body: its nodes in ONNX's textual syntax.
    """

    name: str
    family: str
    summary: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: dict[str, AttributeType]
    body: str

    @property
    def text(self) -> str:
        """The whole function in ONNX's textual syntax."""
        inputs = ", ".join(port.name for port in self.inputs)
        outputs = ", ".join(port.name for port in self.outputs)
        attributes = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        return (
            f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
            f"{self.name}{attributes} ({inputs}) => ({outputs}) {{\n"
            f"{self.body}}}\n"
        )

    def function(self) -> Any:
        """The function as an ``onnx.FunctionProto``."""
        import onnx.parser

        function = onnx.parser.parse_function(self.text)
        function.doc_string = self.summary
        return function

    def op_schema(self) -> Any:
        """The schema as an ``onnx.defs.OpSchema``."""
        from onnx.defs import OpSchema

        def formal(port: Port) -> Any:
            return OpSchema.FormalParameter(
                port.name, variables.get(port.types, f"tensor({port.types[0]})"), port.shape
            )

        ports = (*self.inputs, *self.outputs)
        several = dict.fromkeys(port.types for port in ports if len(port.types) > 1)
        variables = {types: f"T{number}" for number, types in enumerate(several)}
        return OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc=self.summary,
            inputs=[formal(port) for port in self.inputs],
            outputs=[formal(port) for port in self.outputs],
            type_constraints=[
                (name, [f"tensor({element})" for element in types], "")
                for types, name in variables.items()
            ],
            attributes=[
                OpSchema.Attribute(name, getattr(OpSchema.AttrType, kind.upper()), "")
                for name, kind in self.attributes.items()
            ],
        )


def lines(*statements: str) -> str:
    """Statements of a body, one a line."""
    return "".join(f"  {statement}\n" for statement in statements)


def integer(name: str, value: int) -> str:
    """Declares an int64 ``[1]``."""
    return f"{name} = Constant <value_ints: ints = [{value}]> ()"


def extent(name: str, attribute: str) -> tuple[str, str]:
    """Declares an int64 ``[1]`` that holds an attribute; needs ``one``."""
    return (
        f"{name}_number = Constant <value_int: int = @{attribute}> ()",
        f"{name} = Reshape({name}_number, one)",
    )


def chain(x: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """Statements that apply steps to ``x`` one after another; the last result is ``y``."""
    names = [x, *(f"{x}_{number}" for number in range(1, len(steps))), "y"]
    return tuple(
        statement
        for step, (before, after) in zip(steps, pairwise(names), strict=True)
        for statement in step(before, after)
    )


def camel(word: str) -> str:
    """``gelu_tanh -> GeluTanh``."""
    return "".join(part.capitalize() for part in word.split("_"))
