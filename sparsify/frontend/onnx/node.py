"""A node of an ONNX graph, as its handler sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import torch

from sparsify.frontend.onnx.registry import Unsupported
from sparsify.frontend.onnx.sparse import dense
from sparsify.frontend.onnx.tensors import to_computed
from sparsify.frontend.onnx.values import Constant, Value

if TYPE_CHECKING:
    from sparsify.frontend.onnx.interpreter import Interpreter, Scope


@dataclass(frozen=True, eq=False)
class Node:
    """One operator call.

    Attributes:
        operator, domain: as in the file; the domain of ONNX itself is ``""``.
        version: of the domain, as the model imports it.
        name: the node's name, or that of its first output.
        inputs, outputs: names of values; ``""`` for those left out.
        module: the qualified name of the PyTorch module that it comes from, ``""`` if unknown.
    """

    operator: str
    domain: str
    version: int
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, onnx.AttributeProto]
    module: str
    interpreter: Interpreter
    scope: Scope

    def __str__(self) -> str:
        return f"{self.domain or 'ai.onnx'}::{self.operator} (version {self.version}) {self.name!r}"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute as int, float, str, torch.Tensor, GraphProto, or a list of them."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, onnx.TensorProto):
            return to_computed(value)
        if isinstance(value, onnx.SparseTensorProto):
            return to_computed(dense(value, f"{self}: {name}"))
        if isinstance(value, onnx.GraphProto):
            return value
        if isinstance(value, int | float):
            return value
        return [item.decode() if isinstance(item, bytes) else item for item in value]

    def require(self, name: str) -> Any:
        """`get` of an attribute that must be there."""
        if name not in self.attributes:
            raise Unsupported(f"the attribute {name} is missing")
        return self.get(name)

    def element_type(self, index: int) -> int | None:
        """The ONNX element type of an input that is kept in another type, else None."""
        return self.interpreter.types.get(self.inputs[index]) if index < len(self.inputs) else None

    def wants(self, index: int) -> bool:
        """Whether the output of this index has a name, so that somebody may read it."""
        return index < len(self.outputs) and bool(self.outputs[index])

    def parameter(
        self,
        constant: Constant,
        variant: str = "",
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A constant as a weight of the program, stored changed if need be.

        Args:
            variant: names the change; the same change of the same constant is stored once.
            change: makes the stored form from the constant's, on real tensors.
        """
        return self.interpreter.weights.parameter(constant, variant, change, self._weight_name)

    @property
    def _weight_name(self) -> str:
        """What a weight is called that the exporter made and gave no name of its own.

        It is that of the module whose operator this is, as exporters note it.
        """
        if self.module:
            return f"{self.module}.weight"
        scopes: list[str] = []
        for part in self.name.strip("/").split("/")[:-1]:
            # The second of two nested modules is written /head/head.0.
            repeats = bool(scopes) and part.startswith(f"{scopes[-1]}.")
            scopes[len(scopes) - repeats :] = [part]
        return ".".join((*scopes, "weight")) if scopes else f"{self.name}.weight"

    def run(self, graph: onnx.GraphProto, inputs: Sequence[Value] = ()) -> list[Value]:
        """The outputs of a sub-graph, which sees all values of the graph around it."""
        return self.interpreter.run(graph, self.scope.inner(), inputs)
