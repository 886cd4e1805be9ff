"""Changes of element type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.quantities import to_float4
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.tensors import NARROW, computed_type, onnx_type
from sparsify.frontend.onnx.values import elementwise


def _cast_sizes(node: Node, x: np.ndarray) -> np.ndarray:
    to = node.require("to")
    if to == TensorProto.BOOL:
        return elementwise(lambda size: size != 0, x)
    whole = not computed_type(to).is_floating_point
    return elementwise(torch.sym_int if whole else torch.sym_float, x)


@operator("Cast", since=6, on_sizes=_cast_sizes)
def cast(node: Node, x: torch.Tensor) -> torch.Tensor:
    return _to(x, node.require("to"), node)


@operator("CastLike", since=15)
def cast_like(node: Node, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return _to(x, node.element_type(1) or onnx_type(like.dtype), node)


def _to(x: torch.Tensor, code: int, node: Node) -> torch.Tensor:
    dtype = computed_type(code)
    if code in NARROW:
        low, high = NARROW[code]  # the lowest bits count, as in wider integers
        return (torch.remainder(x.long() - low, high - low + 1) + low).to(dtype)
    if code == TensorProto.FLOAT4E2M1:
        return to_float4(x)
    if dtype.itemsize == 1 and dtype.is_floating_point and node.get("saturate", 1):
        x = _saturated(x, dtype)
    elif dtype == torch.float8_e4m3fn:
        # PyTorch saturates; what rounds to more than the largest, 448, is no number.
        x = torch.where(x.abs() > 464, math.nan, x)
    return x if x.dtype == dtype else x.to(dtype)


def _saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers too large for an 8-bit float become its largest, infinities among them."""
    bound: Any = torch.finfo(dtype).max
    return x.clamp(-bound, bound)
