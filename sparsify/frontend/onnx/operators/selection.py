"""Choosing elements by their values, and counting them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.tables import table
from sparsify.frontend.onnx.tensors import NARROW, computed_type, torch_type, widened
from sparsify.frontend.onnx.values import Constant, known


@operator("TopK")
def top_k_by_attribute(node: Node, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _top_k(x, node.require("k"), node.get("axis", -1), True)


@operator("TopK", since=10, host=("count",))
def top_k(node: Node, x: torch.Tensor, count: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    largest = bool(node.get("largest", 1))
    return _top_k(x, count.reshape(-1)[0], node.get("axis", -1), largest)


def _top_k(
    x: torch.Tensor, count: int, axis: int, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = torch.topk(x, count, axis, largest, sorted=True)
    return values, places


@operator("NonZero", since=9)
def non_zero(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Places of all nonzero elements, ``[dims, count]``."""
    return torch.nonzero(x).T


@operator("Compress", since=9, constants=("condition",))
def compress(node: Node, x: torch.Tensor, condition: torch.Tensor | Constant) -> torch.Tensor:
    """The slices along ``axis``, or the elements of the flat input, where the condition holds."""
    axis = node.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    if isinstance(condition, Constant):
        elements = np.asarray(known(condition)).astype(bool)
        return x.index_select(axis, table(np.nonzero(elements)[0], torch.int64))
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))


@operator("Unique", since=11)
def unique(node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Also the first place of each, which of them each element is, and how often it occurs."""
    if not node.get("sorted", 1):
        raise Unsupported("the order in which elements first occur (sorted=0)")
    axis = node.get("axis")
    if axis is None:
        values, inverse, counts = torch.unique(
            x, sorted=True, return_inverse=True, return_counts=True
        )
        inverse = inverse.reshape(-1)
    else:
        values, inverse, counts = torch.unique(
            x, sorted=True, return_inverse=True, return_counts=True, dim=axis
        )
    if not node.wants(1):
        return values, values.new_empty(0), inverse, counts
    place = torch.arange(inverse.shape[0])
    first = place.new_full(counts.shape, inverse.shape[0])
    first = first.scatter_reduce(0, inverse, place, "amin", include_self=True)
    return values, first, inverse, counts


@operator("OneHot", since=9, host=("depth",))
def one_hot(
    node: Node, indices: torch.Tensor, depth: np.ndarray, values: torch.Tensor
) -> torch.Tensor:
    """``values[1]`` where the new dim is the index, ``values[0]`` elsewhere."""
    count: Any = depth.reshape(-1)[0]
    if not isinstance(count, torch.SymInt):
        count = int(count)
    axis = node.get("axis", -1)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    indices = indices.long().unsqueeze(axis)
    indices = torch.where(indices < 0, indices + count, indices)
    shape = [1] * indices.dim()
    shape[axis] = -1
    return torch.where(indices == torch.arange(count).reshape(shape), values[1], values[0])


@operator("EyeLike", since=9)
def eye_like(node: Node, x: torch.Tensor) -> torch.Tensor:
    code = node.get("dtype")
    dtype = x.dtype if code is None else computed_type(code)
    rows, columns = torch.arange(x.shape[0]).unsqueeze(-1), torch.arange(x.shape[1])
    return (columns - rows == node.get("k", 0)).to(dtype)


@operator("ReverseSequence", since=10)
def reverse_sequence(node: Node, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Each row back to front up to its length."""
    time, batch = node.get("time_axis", 0), node.get("batch_axis", 1)
    step_shape, row_shape = [1] * x.dim(), [1] * x.dim()
    step_shape[time], row_shape[batch] = -1, -1
    step = torch.arange(x.shape[time]).reshape(step_shape)
    length = lengths.long().reshape(row_shape)
    source = torch.where(step < length, length - 1 - step, step)
    return x.gather(time, source.expand(x.shape))


@operator("CumProd", since=26, host=("axis",))
def cumulative_product(node: Node, x: torch.Tensor, axis: np.ndarray) -> torch.Tensor:
    """Also from the end (``reverse``), or without the element itself (``exclusive``)."""
    dim = int(axis.reshape(-1)[0])
    x = x.flip(dim) if node.get("reverse", 0) else x
    if node.get("exclusive", 0):
        one = torch.ones_like(x.narrow(dim, 0, 1))
        x = torch.cat([one, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    y = torch.cumprod(x, dim).to(x.dtype)
    return y.flip(dim) if node.get("reverse", 0) else y


@operator("BitCast", since=26)
def bit_cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    kept, to = node.element_type(0), node.require("to")
    if not {kept, to}.isdisjoint(NARROW):
        raise Unsupported("elements of less than 8 bits")
    stored = x if kept is None else x.to(torch_type(kept))
    return widened(stored.view(torch_type(to)))
