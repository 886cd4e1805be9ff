"""TensorProto and element types between ONNX and PyTorch."""

from __future__ import annotations

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
}


def torch_type(code: int) -> torch.dtype:
    """The torch.dtype of an element type of ONNX.

    Raises:
        Unsupported: PyTorch has none, as for strings.
    """
    if code not in _TYPES:
        names = {number: name for name, number in TensorProto.DataType.items()}
        raise Unsupported(f"element type {names.get(code, code)}")
    return _TYPES[code]


def onnx_type(dtype: torch.dtype) -> int:
    """The element type of ONNX for a torch.dtype."""
    return next(code for code, known in _TYPES.items() if known == dtype)


def to_torch(tensor: onnx.TensorProto) -> torch.Tensor:
    """A real tensor with its own memory, of the file's element type."""
    dtype = torch_type(tensor.data_type)
    array = numpy_helper.to_array(tensor)
    with untraced():
        if dtype.itemsize < 4 and dtype.is_floating_point and dtype != torch.float16:
            bits = array.view(np.uint16 if dtype.itemsize == 2 else np.uint8)
            return torch.from_numpy(bits.copy()).view(dtype)
        return torch.from_numpy(array.copy())


def to_onnx(tensor: torch.Tensor, name: str) -> onnx.TensorProto:
    """A tensor as an initializer of this name."""
    made = onnx.TensorProto(name=name, dims=tensor.shape, data_type=onnx_type(tensor.dtype))
    if tensor.numel():
        made.raw_data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return made
