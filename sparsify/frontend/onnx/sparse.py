"""Sparse initializers and constants of ONNX, as the dense tensors that they stand for.

The compiler chooses the storage itself, by what is zero.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify.frontend.onnx.values import LARGEST


def densify(graph: onnx.GraphProto, path: str) -> None:
    """Makes initializers of the sparse ones of a graph and the graphs within it, in place.

    Raises:
        ValueError: naming the initializer, when it is malformed or too large.
    """
    for tensor in graph.sparse_initializer:
        graph.initializer.append(dense(tensor, f"{path}: sparse initializer"))
    del graph.sparse_initializer[:]
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (attribute.g, *attribute.graphs):
            densify(inner, path)


def dense(tensor: onnx.SparseTensorProto, what: str) -> onnx.TensorProto:
    """Indices are ``[nnz]``, places in the flat tensor, or ``[nnz, rank]``; in any order."""
    what = f"{what} {tensor.values.name!r} of shape {list(tensor.dims)}"
    values = numpy_helper.to_array(tensor.values).reshape(-1)
    size = math.prod(tensor.dims)
    if min(tensor.dims, default=1) < 0 or size * values.itemsize > LARGEST:
        raise ValueError(f"{what} is larger than {LARGEST / 2**30:.0f} GiB as a dense tensor")
    indices = numpy_helper.to_array(tensor.indices).astype(np.int64)
    if indices.ndim == 2 and indices.shape[1] == len(tensor.dims):
        shape = np.array(tensor.dims, np.int64)
        if (indices < 0).any() or (indices >= shape).any():
            raise ValueError(f"{what} has indices outside of it")
        indices = np.ravel_multi_index(tuple(indices.T), tuple(tensor.dims))
    if indices.shape != values.shape:
        raise ValueError(f"{what} has {values.size} values for indices {list(indices.shape)}")
    if ((indices < 0) | (indices >= size)).any():
        raise ValueError(f"{what} has indices outside of it")
    full = np.zeros(size, values.dtype)
    full[indices] = values
    return numpy_helper.from_array(full.reshape(tuple(tensor.dims)), tensor.values.name)
