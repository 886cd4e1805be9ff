"""Shapes as values, and operators that give a tensor another shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.values import Constant, sizes


@operator("Constant")
def constant(node: Node) -> torch.Tensor:
    """Elements given by one attribute, of whatever name."""
    name = next(iter(node.attributes), "value")
    if name in ("value", "sparse_value"):
        return node.require(name)
    kinds = {"value_float": torch.float32, "value_floats": torch.float32}
    kinds |= {"value_int": torch.int64, "value_ints": torch.int64}
    if name not in kinds:
        raise Unsupported(f"a constant given by {name}")
    return torch.tensor(node.require(name), dtype=kinds[name])


@operator("Shape", constants=("x",), on_sizes=lambda node, x: _some(node, x.shape))
def shape(node: Node, x: torch.Tensor | Constant) -> np.ndarray:
    """The sizes of the dims from ``start`` to ``end``."""
    return _some(node, x.tensor.shape if isinstance(x, Constant) else x.shape)


def _some(node: Node, shape: Sequence[Any]) -> np.ndarray:
    return sizes(list(shape)[node.get("start", 0) : node.get("end", len(shape))])


@operator("Size", constants=("x",), on_sizes=lambda node, x: sizes(x.size))
def size(node: Node, x: torch.Tensor | Constant) -> np.ndarray:
    return sizes((x.tensor if isinstance(x, Constant) else x).numel())


def _reshape_sizes(node: Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return x.reshape([int(size) for size in shape])


@operator("Reshape", since=5, host=("shape",), on_sizes=_reshape_sizes)
def reshape(node: Node, x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    """Size 0 copies the input's, unless ``allowzero``; one size of -1 is inferred."""
    wanted = to_list(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[d] if is_number(size, 0) else size for d, size in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Two dims: those before ``axis``, and the others."""
    axis = node.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    rows = x.flatten(0, axis - 1) if axis else x.unsqueeze(0)
    return rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)


@operator("Transpose", on_sizes=lambda node, x: x.transpose(node.get("perm")))
def transpose(node: Node, x: torch.Tensor) -> torch.Tensor:
    return x.permute(node.get("perm") or list(reversed(range(x.dim()))))


def _squeeze_sizes(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    chosen = axes_of(node, axes)
    return x.squeeze(None if chosen is None else tuple(chosen))


@operator("Squeeze", host=("axes",), on_sizes=_squeeze_sizes)
def squeeze(node: Node, x: torch.Tensor, axes: np.ndarray | None = None) -> torch.Tensor:
    """Without the dims ``axes``, all of size 1; an attribute up to version 12."""
    chosen = axes_of(node, axes)
    if chosen is None:
        chosen = [d for d, size in enumerate(x.shape) if is_number(size, 1)]
    for axis in chosen:
        torch._check(x.shape[axis] == 1, lambda: "a squeezed dim must have size 1")
    return x.squeeze(chosen)


def _unsqueeze_sizes(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.expand_dims(x, tuple(axes_of(node, axes) or ()))


@operator("Unsqueeze", host=("axes",), on_sizes=_unsqueeze_sizes)
def unsqueeze(node: Node, x: torch.Tensor, axes: np.ndarray | None = None) -> torch.Tensor:
    """With dims of size 1, ``axes`` of the result; an attribute up to version 12."""
    chosen = axes_of(node, axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(axis + rank if axis < 0 else axis for axis in chosen):
        x = x.unsqueeze(axis)
    return x


def _expand_sizes(node: Node, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, [int(size) for size in shape]))


@operator("Expand", since=8, host=("shape",), on_sizes=_expand_sizes)
def expand(node: Node, x: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    """Broadcast with a shape, in both directions."""
    wanted = to_list(shape)
    rank = max(x.dim(), len(wanted))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    return x.expand([a if is_number(b, 1) else b for a, b in zip(own, wanted, strict=True)])


@operator("Tile", since=6, host=("repeats",))
def tile(node: Node, x: torch.Tensor, repeats: np.ndarray) -> torch.Tensor:
    return x.repeat(to_list(repeats))


def _concat_sizes(node: Node, *arrays: np.ndarray) -> np.ndarray:
    return np.concatenate([a.astype(object) for a in arrays], node.require("axis"))


@operator("Concat", since=4, on_sizes=_concat_sizes)
def concat(node: Node, *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, node.require("axis"))


def _split_sizes(node: Node, x: np.ndarray, parts: np.ndarray | None = None) -> list[np.ndarray]:
    axis = node.get("axis", 0)
    return np.split(x, np.cumsum(_parts(node, x.shape[axis], parts))[:-1], axis)


@operator("Split", host=("parts",), on_sizes=_split_sizes)
def split(node: Node, x: torch.Tensor, parts: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
    """Parts of given sizes (an attribute up to version 12), else of one size, the last smaller."""
    axis = node.get("axis", 0)
    return tuple(x.split(_parts(node, x.shape[axis], parts), axis))


def _parts(node: Node, size: Any, parts: np.ndarray | None) -> list[Any]:
    given = node.get("split") if parts is None else to_list(parts)
    if given:
        return given
    count = node.get("num_outputs", len(node.outputs))
    each = (size + count - 1) // count
    return [each] * (count - 1) + [size - each * (count - 1)]


@operator("ConstantOfShape", since=9, host=("shape",))
def constant_of_shape(node: Node, shape: np.ndarray) -> torch.Tensor:
    value = node.get("value")
    fill, dtype = (0.0, torch.float32) if value is None else (Constant(value).item(), value.dtype)
    return torch.full(to_list(shape), fill, dtype=dtype)


@operator("Range", since=11, host=("start", "limit", "delta"))
def arange(node: Node, start: np.ndarray, limit: np.ndarray, delta: np.ndarray) -> torch.Tensor:
    arrays = (start, limit, delta)
    given = [array.dtype for array in arrays if array.dtype != object]
    dtype = torch.from_numpy(np.empty(0, given[0])).dtype if given else torch.int64
    return torch.arange(*(array.item() for array in arrays), dtype=dtype)


def axes_of(node: Node, axes: np.ndarray | None) -> list[int] | None:
    """Axes that newer versions take as an input and older ones as an attribute."""
    return node.get("axes") if axes is None else [int(axis) for axis in axes.flat]


def to_list(array: np.ndarray) -> list[Any]:
    """The elements as Python's or symbolic numbers."""
    return list(array.flat) if array.dtype == object else array.flatten().tolist()


def is_number(size: Any, number: int) -> bool:
    """Whether a size is known to be this; a symbolic one is taken for another."""
    return not isinstance(size, torch.SymInt) and bool(size == number)
