"""Chains of linears as .tflite files, the way that LiteRT hands them to XNNPACK.

XNNPACK multiplies sparse weights in convolutions of 1x1 alone, between a convolution of 3x3 with
stride 2 on three channels, which goes from pixels to channels, and a mean over the pixels, which
leaves them; where at least two thirds of all weights are zero. So a sparse chain is an image whose
pixels are the tokens. The schema is the module `schema_py_generated` of LiteRT's wheel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Linear = tuple[Floats, Floats]
"""A weight (out, in) and a bias (out)."""


@dataclass
class _File:
    """A model with one graph, written operator by operator."""

    schema: Any
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, self.graph = self.schema.ModelT(), self.schema.SubGraphT()
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.buffers = [self.schema.BufferT()]  # the empty one of tensors without data
        self.graph.tensors, self.graph.operators = [], []

    def tensor(self, shape: Sequence[int], data: NDArray[Any] | None = None) -> int:
        made = self.schema.TensorT()
        made.name, made.shape, made.buffer = f"t{len(self.graph.tensors)}", list(shape), 0
        made.type = self.schema.TensorType.FLOAT32
        if data is not None:
            if data.dtype == np.int32:
                made.type = self.schema.TensorType.INT32
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def operator(self, name: str, inputs: list[int], output: int, kind: str, **options: Any) -> int:
        """``name`` is the operator's, ``kind`` that of its options; gives its output."""
        code = getattr(self.schema.BuiltinOperator, name)
        if code not in self.codes:
            self.codes.append(code)
        made = self.schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = self.codes.index(code), inputs, [output]
        made.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
        made.builtinOptions = getattr(self.schema, f"{kind}T")()
        for option, value in options.items():
            setattr(made.builtinOptions, option, value)
        self.graph.operators.append(made)
        return output

    def save(self, path: Path, given: int, result: int) -> None:
        import flatbuffers

        self.graph.inputs, self.graph.outputs = [given], [result]
        self.model.operatorCodes = []
        for code in self.codes:
            made = self.schema.OperatorCodeT()
            made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), 1
            self.model.operatorCodes.append(made)
        builder = flatbuffers.Builder()
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())

    def convolution(self, x: int, weight: int, bias: Floats, size: Sequence[int], by: int) -> int:
        bias_tensor = self.tensor(bias.shape, bias)
        return self.operator(
            "CONV_2D", [x, weight, bias_tensor], self.tensor(size), "Conv2DOptions",
            strideW=by, strideH=by, padding=self.schema.Padding.VALID,
        )  # fmt: skip

    def sparse_weight(self, weight: Floats) -> int:
        """A weight stored by its nonzeros, as one of a 1x1 convolution."""
        rows, columns = weight.shape
        shape = (rows, 1, 1, columns)
        stored = self.tensor(shape, weight[weight != 0])
        kept = self.schema.SparsityParametersT()
        kept.traversalOrder, kept.dimMetadata = [0, 1, 2, 3], []
        for size in shape[:-1]:
            dense = self.schema.DimensionMetadataT()
            dense.format, dense.denseSize = self.schema.DimensionType.DENSE, size
            kept.dimMetadata.append(dense)
        sparse = self.schema.DimensionMetadataT()
        sparse.format = self.schema.DimensionType.SPARSE_CSR
        kinds = self.schema.SparseIndexVector
        sparse.arraySegmentsType = sparse.arrayIndicesType = kinds.Int32Vector
        sparse.arraySegments = self.schema.Int32VectorT()
        sparse.arrayIndices = self.schema.Int32VectorT()
        ends = np.cumsum((weight != 0).sum(1))
        sparse.arraySegments.values = np.concatenate([[0], ends]).astype(np.int32)
        sparse.arrayIndices.values = np.nonzero(weight)[1].astype(np.int32)
        kept.dimMetadata.append(sparse)
        self.graph.tensors[stored].sparsity = kept
        return self.operator("DENSIFY", [stored], self.tensor(shape), "DensifyOptions")


def write_dense(schema: Any, path: Path, linears: Sequence[Linear], tokens: int) -> None:
    """Fully connected layers, one after the other: [tokens, in] to [tokens, out]."""
    file = _File(schema)
    given = x = file.tensor([tokens, linears[0][0].shape[1]])
    for weight, bias in linears:
        inputs = [x, file.tensor(weight.shape, weight), file.tensor(bias.shape, bias)]
        result = file.tensor([tokens, len(bias)])
        x = file.operator("FULLY_CONNECTED", inputs, result, "FullyConnectedOptions")
    file.save(path, given, x)


def write_sparse(
    schema: Any, path: Path, stem: Linear, linears: Sequence[Linear], size: tuple[int, int]
) -> None:
    """An image of 2 x ``size`` pixels to the mean over ``size`` pixels of the last linear.

    The stem is a convolution's, its weight (out, 3, 3, 3) with the channels last.
    """
    file = _File(schema)
    height, width = size
    given = file.tensor([1, 2 * height, 2 * width, 3])
    border = file.tensor([4, 2], np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32))
    padded = file.tensor([1, 2 * height + 2, 2 * width + 2, 3])
    x = file.operator("PAD", [given, border], padded, "PadOptions")
    weight, bias = stem
    x = file.convolution(
        x, file.tensor(weight.shape, weight), bias, [1, height, width, len(bias)], 2
    )
    for weight, bias in linears:
        shape = [1, height, width, len(bias)]
        x = file.convolution(x, file.sparse_weight(weight), bias, shape, 1)
    axes = file.tensor([2], np.array([1, 2], np.int32))
    mean = file.tensor([1, 1, 1, len(linears[-1][1])])
    x = file.operator("MEAN", [x, axes], mean, "ReducerOptions", keepDims=True)
    file.save(path, given, x)
