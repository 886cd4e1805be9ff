"""Reductions over some dims, or all."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.operators.shapes import axes_of
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.values import sizes

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _reduction(name: str, compute: Reduction, on_sizes: Callable[[Any, Any], Any] | None) -> None:
    """Registers a reduction; axes are an attribute in older versions, an input in newer ones.

    ``on_sizes`` combines two numbers.
    """

    def reduce_sizes(node: Node, x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
        total = reduce(on_sizes, x.flat)  # type: ignore[arg-type]
        return sizes(total).reshape([1] * x.ndim if node.get("keepdims", 1) else [])

    @operator(name, host=("axes",), on_sizes=reduce_sizes if on_sizes else None)
    def run(node: Node, x: torch.Tensor, axes: np.ndarray | None = None) -> torch.Tensor:
        dims = axes_of(node, axes)
        if not dims:
            if node.get("noop_with_empty_axes", 0):
                return compute(x.unsqueeze(0), [0], False)
            dims = list(range(x.dim()))
        return compute(x, dims, bool(node.get("keepdims", 1)))


def _each(compute: Callable[[torch.Tensor, int, bool], torch.Tensor]) -> Reduction:
    """A reduction over several dims by one over one dim."""

    def run(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
        for dim in sorted((d + x.dim() if d < 0 else d for d in dims), reverse=True):
            x = compute(x, dim, keep)
        return x

    return run


def _sum(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return x.sum(dims, keepdim=keep, dtype=x.dtype) if dims else x


def _mean(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    if x.is_floating_point():
        return x.mean(dims, keepdim=keep)
    return x.double().mean(dims, keepdim=keep).to(x.dtype)


def _extreme(largest: bool) -> Reduction:
    compute = torch.amax if largest else torch.amin

    def run(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
        if x.dtype == torch.bool:
            return run(x.to(torch.uint8), dims, keep).bool()
        if any(isinstance(size, int) and size == 0 for size in x.shape):
            shape = _sum(x, dims, keep).shape
            return torch.full(shape, _neutral(x.dtype, largest), dtype=x.dtype)
        return compute(x, dims, keep)

    return run


def _neutral(dtype: torch.dtype, largest: bool) -> float | int:
    """The extreme of nothing."""
    if dtype.is_floating_point:
        return float("-inf") if largest else float("inf")
    info = torch.iinfo(dtype)
    return info.min if largest else info.max


def _l2(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    wide = x if x.is_floating_point() else x.double()
    return _sum(wide * wide, dims, keep).sqrt().to(x.dtype)


def _log_sum_exp(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    wide = x if x.is_floating_point() else x.double()
    return torch.logsumexp(wide, dims, keep).to(x.dtype)


def _log_sum(x: torch.Tensor, dims: list[int], keep: bool) -> torch.Tensor:
    return _sum(x, dims, keep).log().to(x.dtype)


_product = _each(lambda x, dim, keep: x.prod(dim, keepdim=keep, dtype=x.dtype))

_reduction("ReduceSum", _sum, lambda a, b: a + b)
_reduction("ReduceMean", _mean, None)
_reduction("ReduceProd", _product, lambda a, b: a * b)
_reduction("ReduceMax", _extreme(True), torch.sym_max)
_reduction("ReduceMin", _extreme(False), torch.sym_min)
_reduction("ReduceL1", lambda x, dims, keep: _sum(x.abs(), dims, keep), None)
_reduction("ReduceL2", _l2, None)
_reduction("ReduceSumSquare", lambda x, dims, keep: _sum(x * x, dims, keep), None)
_reduction("ReduceLogSum", _log_sum, None)
_reduction("ReduceLogSumExp", _log_sum_exp, None)


def _place(name: str, compute: Callable[..., torch.Tensor]) -> None:
    @operator(name)
    def run(node: Node, x: torch.Tensor) -> torch.Tensor:
        """The first place, or with ``select_last_index`` the last."""
        axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
        if not node.get("select_last_index", 0):
            return compute(x, axis, keep)
        return x.shape[axis] - 1 - compute(x.flip(axis), axis, keep)


_place("ArgMax", torch.argmax)
_place("ArgMin", torch.argmin)


@operator("CumSum", since=11, host=("axis",))
def cumulative_sum(node: Node, x: torch.Tensor, axis: np.ndarray) -> torch.Tensor:
    """Also from the end (``reverse``), or without the element itself (``exclusive``)."""
    dim = int(axis.item())
    x = x.flip(dim) if node.get("reverse", 0) else x
    total = x.cumsum(dim).to(x.dtype)
    total = total - x if node.get("exclusive", 0) else total
    return total.flip(dim) if node.get("reverse", 0) else total
