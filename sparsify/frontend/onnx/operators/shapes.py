"""Shapes as values, and operators that give a tensor another shape."""

from __future__ import annotations

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.values import Constant, sizes


@operator("Constant")
def constant(node: Node) -> torch.Tensor:
    """Elements given by one attribute, of whatever name."""
    name = next(iter(node.attributes), "value")
    if name == "value":
        return node.require("value")
    kinds = {"value_float": torch.float32, "value_floats": torch.float32}
    kinds |= {"value_int": torch.int64, "value_ints": torch.int64}
    if name not in kinds:
        raise Unsupported(f"a constant given by {name}")
    return torch.tensor(node.require(name), dtype=kinds[name])


@operator("Shape", constants=("x",))
def shape(node: Node, x: torch.Tensor | Constant) -> np.ndarray:
    """The sizes of some dims, ``start`` to ``end``."""
    tensor = x.tensor if isinstance(x, Constant) else x
    return sizes(list(tensor.shape)[node.get("start", 0) : node.get("end", tensor.dim())])


@operator("Reshape", since=5, host=("shape",))
def reshape(node: Node, x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    """Size 0 copies the input's, unless ``allowzero``; one size of -1 is inferred."""
    wanted = list(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[d] if is_zero(size) else size for d, size in enumerate(wanted)]
    return x.reshape([int(s) if isinstance(s, np.integer) else s for s in wanted])


def is_zero(size: object) -> bool:
    """Whether a size is known to be 0; a symbolic one is taken for another."""
    return not isinstance(size, torch.SymInt) and size == 0
