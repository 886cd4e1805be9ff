"""Parts of tensors: slices, gathers, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.shapes import to_list
from sparsify.frontend.onnx.registry import Unsupported, operator
from sparsify.frontend.onnx.values import Constant, known


def _gather_sizes(node: Node, x: np.ndarray, indices: np.ndarray) -> Any:
    if indices.dtype == object:
        return NotImplemented
    return np.asarray(x.take(indices.astype(np.int64), axis=node.get("axis", 0)), dtype=object)


@operator("Gather", constants=("x", "indices"), on_sizes=_gather_sizes)
def gather(node: Node, x: torch.Tensor | Constant, indices: torch.Tensor | Constant) -> Any:
    """Entries of one dim; indices may be negative."""
    axis = node.get("axis", 0)
    if isinstance(x, Constant):
        table = node.parameter(x)
        if table.dim() == 2 and axis == 0 and table.is_floating_point():
            return F.embedding(_tensor(node, indices).long(), table)
        x = table
    chosen = known(indices)
    if chosen is None:
        return _gather_computed(x, axis, _tensor(node, indices))
    size = x.shape[axis]
    places = [i + size if i < 0 else i for i in chosen.flatten().tolist()]
    if chosen.ndim == 0:
        return x.select(axis, places[0])
    if len(places) == 1:
        return x.narrow(axis, places[0], 1).reshape(_replaced(x, axis, chosen.shape))
    index = _absolute(_tensor(node, indices), size) if (chosen < 0).any() else indices
    return _gather_computed(x, axis, _tensor(node, index))


def _gather_computed(x: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
    """aten.index takes negative indices as ONNX does."""
    axis += x.dim() if axis < 0 else 0
    return x[(slice(None),) * axis + (indices.long(),)]


def _tensor(node: Node, value: torch.Tensor | Constant) -> torch.Tensor:
    return node.parameter(value) if isinstance(value, Constant) else value


def _replaced(x: torch.Tensor, axis: int, shape: tuple[int, ...]) -> list[Any]:
    axis += x.dim() if axis < 0 else 0
    return [*x.shape[:axis], *shape, *x.shape[axis + 1 :]]


def _absolute(indices: torch.Tensor, size: Any) -> torch.Tensor:
    """Indices counted from the front."""
    return torch.where(indices < 0, indices + size, indices).long()


@operator("GatherElements", since=11)
def gather_elements(node: Node, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    axis = node.get("axis", 0)
    return torch.gather(x, axis, _absolute(indices, x.shape[axis]))


@operator("GatherND", since=11)
def gather_nd(node: Node, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The last dim of the indices is a place in the dims after the ``batch_dims``."""
    batch = node.get("batch_dims", 0)
    places = list(indices.long().unbind(-1))
    rows = []
    for dim in range(batch):
        shape = [1] * places[0].dim()
        shape[dim] = x.shape[dim]
        rows.append(torch.arange(x.shape[dim]).reshape(shape))
    return x[(*rows, *places)]


def _slices(
    node: Node, rank: int, starts: Any, ends: Any, axes: Any, steps: Any
) -> list[tuple[int, Any, Any, int]]:
    """(axis, start, end, step); attributes up to version 9, inputs from 10 on."""
    if starts is None:
        starts, ends = node.require("starts"), node.require("ends")
        axes = node.get("axes")
    else:
        starts, ends = to_list(starts), to_list(ends)
        axes = None if axes is None else to_list(axes)
    steps = [1] * len(starts) if steps is None else to_list(steps)
    axes = list(range(len(starts))) if axes is None else axes
    axes = [axis + rank if axis < 0 else axis for axis in axes]
    return list(zip(axes, starts, ends, steps, strict=True))


def _slice_sizes(
    node: Node, x: np.ndarray, starts: Any = None, ends: Any = None, axes: Any = None,
    steps: Any = None,
) -> np.ndarray:  # fmt: skip
    for axis, start, end, step in _slices(node, x.ndim, starts, ends, axes, steps):
        end = None if step < 0 and end < -x.shape[axis] else end
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


@operator("Slice", host=("starts", "ends", "axes", "steps"), on_sizes=_slice_sizes)
def slice_(
    node: Node,
    x: torch.Tensor,
    starts: np.ndarray | None = None,
    ends: np.ndarray | None = None,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> torch.Tensor:
    """Some dims from start to end; both are clamped, and steps may be negative."""
    for axis, start, end, step in _slices(node, x.dim(), starts, ends, axes, steps):
        if step < 0:
            x, start, end, step = _turned(x, axis, start, end, step)
        x = x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


def _turned(x: torch.Tensor, axis: int, start: Any, end: Any, step: int) -> Any:
    """A slice backwards as one forwards over the flipped dim."""
    last = x.shape[axis] - 1
    start = torch.sym_min(start + last + 1 if start < 0 else start, last)
    end = torch.sym_max(end + last + 1 if end < 0 else end, -1)
    return x.flip(axis), torch.sym_max(last - start, 0), last - end, -step


@operator("Pad", host=("pads", "value", "axes"))
def pad(
    node: Node,
    x: torch.Tensor,
    pads: np.ndarray | None = None,
    value: np.ndarray | None = None,
    axes: np.ndarray | None = None,
) -> torch.Tensor:
    """Entries before and after some dims, removed ones where negative."""
    given = node.get("pads", node.get("paddings")) if pads is None else to_list(pads)
    fill = node.get("value", 0.0) if value is None else value.item()
    if given is None:
        raise Unsupported("no pads are given")
    dims = list(range(x.dim())) if axes is None else [int(axis) for axis in axes]
    amounts = {
        axis + x.dim() if axis < 0 else axis: (given[i], given[i + len(dims)])
        for i, axis in enumerate(dims)
    }
    mode = node.get("mode", "constant")
    if mode == "constant":
        flat = [n for d in reversed(range(x.dim())) for n in amounts.get(d, (0, 0))]
        while flat[-2:] == [0, 0]:
            flat = flat[:-2]
        return F.pad(x, flat, value=fill) if flat else x
    for axis, (before, after) in amounts.items():
        if (before, after) != (0, 0):
            x = _pad_from_within(x, axis, before, after, mode)
    return x


def _pad_from_within(x: torch.Tensor, axis: int, before: Any, after: Any, mode: str) -> Any:
    """Padding by entries of the tensor itself: reflect, edge or wrap."""
    size = x.shape[axis]
    index = torch.arange(-before, size + after)
    if mode == "edge":
        index = index.clamp(0, size - 1)
    elif mode == "wrap":
        index = index % size
    elif mode == "reflect":
        index = (size - 1) - ((index % torch.sym_max(2 * size - 2, 1)) - (size - 1)).abs()
    else:
        raise Unsupported(f"mode {mode}")
    return x.index_select(axis, index)


@operator("Trilu", since=14, host=("k",))
def trilu(node: Node, x: torch.Tensor, k: np.ndarray | None = None) -> torch.Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)
