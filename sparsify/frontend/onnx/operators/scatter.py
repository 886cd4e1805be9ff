"""Writing elements to computed places."""

from __future__ import annotations

import math
from typing import Any

import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(
    x: torch.Tensor, dim: int, places: torch.Tensor, updates: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Along a dim; places may count from the end."""
    places = places.long()
    places = torch.where(places < 0, places + x.shape[dim], places)
    if reduction == "none":
        return x.scatter(dim, places, updates)
    return x.scatter_reduce(dim, places, updates, _REDUCTIONS[reduction], include_self=True)


@operator("Scatter", since=9)
@operator("ScatterElements", since=11)
def scatter_elements(
    node: Node, x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    return _scatter(x, node.get("axis", 0), indices, updates, node.get("reduction", "none"))


@operator("ScatterND", since=11)
def scatter_nd(
    node: Node, x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor
) -> torch.Tensor:
    """The last dim of the indices is a place in the first dims, where a slice is written."""
    count = indices.shape[-1]
    sizes, rest = x.shape[:count], x.shape[count:]
    place: Any = 0
    for dim, size in enumerate(sizes):
        column = indices[..., dim]
        place = place * size + torch.where(column < 0, column + size, column)
    width = math.prod(rest)
    place = place.reshape(-1, 1).expand(-1, width)
    table = x.reshape(math.prod(sizes), width)
    updates = updates.reshape(place.shape[0], width)
    return _scatter(table, 0, place, updates, node.get("reduction", "none")).reshape(x.shape)


@operator("TensorScatter", since=24)
def tensor_scatter(
    node: Node, cache: torch.Tensor, update: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Writes tokens into a cache, from each row's start on; ``circular`` goes on at the front."""
    axis = node.get("axis", -2) % cache.dim()
    place = torch.arange(update.shape[axis]).unsqueeze(0)
    if starts is not None:
        place = place + starts.reshape(-1, 1)
    if node.get("mode", "linear") == "circular":
        place = place % cache.shape[axis]
    shape = [1] * cache.dim()
    shape[0], shape[axis] = place.shape[0], place.shape[1]
    return cache.scatter(axis, place.reshape(shape).expand(update.shape), update)
