"""TensorProto and element types between ONNX and PyTorch."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from sparsify.frontend.onnx.registry import Unsupported
from sparsify.frontend.onnx.values import untraced

_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    # PyTorch has nothing so narrow.
    TensorProto.INT4: torch.int8,
    TensorProto.INT2: torch.int8,
    TensorProto.UINT4: torch.uint8,
    TensorProto.UINT2: torch.uint8,
    TensorProto.FLOAT4E2M1: torch.float32,
}
_HALVES = (torch.float16, torch.bfloat16)

NARROW: Final = {
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
}
"""Integers that are kept in 8 bits, with their smallest and largest."""


def torch_type(code: int) -> torch.dtype:
    """The torch.dtype of an element type of ONNX, in which callers give it and get it.

    Raises:
        Unsupported: PyTorch has none, as for strings.
    """
    if code not in _TYPES:
        names = {number: name for name, number in TensorProto.DataType.items()}
        raise Unsupported(f"element type {names.get(code, code)}")
    return _TYPES[code]


def computed_type(code: int) -> torch.dtype:
    """The torch.dtype in which values of an element type are kept between a model's nodes.

    That is `torch_type`, but for floating-point numbers of 16 bits, which are kept in float32: it
    holds each of them, and no kernel computes with less. What nodes compute is not rounded to 16
    bits until it leaves the model.
    """
    dtype = torch_type(code)
    return torch.float32 if dtype in _HALVES else dtype


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in its `computed_type`."""
    return tensor.float() if tensor.dtype in _HALVES else tensor


def narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A computed tensor in the type that a model declares for it, where that is of 16 bits."""
    return tensor.to(dtype) if dtype in _HALVES and tensor.dtype == torch.float32 else tensor


def is_kept_otherwise(code: int) -> bool:
    """Whether the dtype of a value no longer tells that it is of this element type."""
    return code in NARROW or code == TensorProto.FLOAT4E2M1 or _TYPES.get(code) in _HALVES


def onnx_type(dtype: torch.dtype) -> int:
    """The element type of ONNX for a torch.dtype."""
    return next(code for code, known in _TYPES.items() if known == dtype)


def to_torch(tensor: onnx.TensorProto) -> torch.Tensor:
    """A real tensor with its own memory, of the `torch_type` of the file's element type."""
    dtype = torch_type(tensor.data_type)
    array = numpy_helper.to_array(tensor)
    if tensor.data_type in NARROW or tensor.data_type == TensorProto.FLOAT4E2M1:
        array = array.astype(np.float32).astype(str(dtype).removeprefix("torch."))
    with untraced():
        if dtype.itemsize < 4 and dtype.is_floating_point and dtype != torch.float16:
            bits = array.view(np.uint16 if dtype.itemsize == 2 else np.uint8)
            return torch.from_numpy(bits.copy()).view(dtype)
        return torch.from_numpy(array.copy())


def to_computed(tensor: onnx.TensorProto) -> torch.Tensor:
    """`to_torch` in the `computed_type`."""
    made = to_torch(tensor)
    with untraced():
        return widened(made)


def to_onnx(tensor: torch.Tensor, name: str) -> onnx.TensorProto:
    """A tensor as an initializer of this name."""
    made = onnx.TensorProto(name=name, dims=tensor.shape, data_type=onnx_type(tensor.dtype))
    if tensor.numel():
        made.raw_data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return made
