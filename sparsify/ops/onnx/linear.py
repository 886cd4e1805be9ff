"""``sparse_linear`` in ONNX: ``Linear{Csr,Bitmap,Dense}[Bias][activation][Add]``.

``y = activation(x @ W.T + bias) + residual``, where ``W[out_features, in_features]`` is stored as

- csr: the nonzeros row by row, columns ascending in a row, in the narrowest type that holds them;
- bitmap: a bit for each weight, rows padded to whole bytes, column ``8 j + i`` in bit ``i`` (of
  value ``2 ** i``) of byte ``j``, and the nonzeros row by row;
- dense: the matrix.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Literal

from sparsify.ops.linear import ACTIVATIONS
from sparsify.ops.onnx.activations import activate, suffix
from sparsify.ops.onnx.schema import (
    FLOAT,
    PACKED_VALUES,
    OnnxOperator,
    Port,
    Step,
    camel,
    chain,
    extent,
    integer,
    lines,
)

Storage = Literal["csr", "bitmap", "dense"]

X = Port("x", FLOAT, "[..., in_features]")
Y = Port("y", FLOAT, "[..., out_features]")
BIAS = Port("bias", FLOAT, "[out_features]", constant=True)
_RESIDUAL = Port("residual", FLOAT, "[..., out_features]")

WEIGHTS: dict[Storage, tuple[Port, ...]] = {
    "csr": (
        Port("values", PACKED_VALUES, "[nnz]", constant=True),
        Port("columns", ("uint8", "uint16", "int32"), "[nnz]", constant=True),
        Port("row_offsets", ("int32",), "[out_features + 1]", constant=True),
    ),
    "bitmap": (
        Port("bits", ("uint8",), "[out_features, ceil(in_features / 8)]", constant=True),
        Port("values", PACKED_VALUES, "[nnz]", constant=True),
    ),
    "dense": (
        Port("weight", PACKED_VALUES, "[out_features, in_features]", constant=True),
    ),
}  # fmt: skip
"""The tensors of a weight in each storage, which follow ``x`` among the inputs."""

_PARTS = (
    integer("none", 0),
    integer("last", -1),
    "extents = Concat <axis: int = 0> (out_extent, in_extent)",
    "first_axis = Constant <value_int: int = 0> ()",
    "zero = Constant <value: tensor = float[1] {0.0}> ()",
    "nonzeros = Cast <to: int = 1> (values)",
)
_MATRIX: dict[Storage, tuple[str, ...]] = {
    # A nonzero's row is the number of rows that end at its position or before.
    "csr": (
        *_PARTS,
        integer("behind", 2**31 - 1),
        "short_ends = Slice(row_offsets, one, behind)",
        "ends = Cast <to: int = 7> (short_ends)",
        "nnz = Shape(values)",
        "positions = Add(nnz, one)",
        "unmarked = Expand(none, positions)",
        "marks = Expand(one, out_extent)",
        'marked = ScatterElements <axis: int = 0, reduction: string = "add"> '
        "(unmarked, ends, marks)",
        "counted = CumSum(marked, first_axis)",
        "rows = Slice(counted, none, last)",
        "starts = Mul(rows, in_extent)",
        "wide_columns = Cast <to: int = 7> (columns)",
        "places = Add(starts, wide_columns)",
        "elements = Mul(out_extent, in_extent)",
        "zeros = Expand(zero, elements)",
        "flat = ScatterElements <axis: int = 0> (zeros, places, nonzeros)",
        "matrix = Reshape(flat, extents)",
    ),
    # A set bit's value is the one at its rank; rank 0 is a zero before them all.
    "bitmap": (
        *_PARTS,
        "shifts = Constant <value: tensor = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()",
        "lowest = Constant <value: tensor = uint8[1] {1}> ()",
        "bytes = Unsqueeze(bits, last)",
        'moved = BitShift <direction: string = "RIGHT"> (bytes, shifts)',
        "eights = BitwiseAnd(moved, lowest)",
        "padded_extents = Concat <axis: int = 0> (out_extent, last)",
        "padded = Reshape(eights, padded_extents)",
        "cut = Slice(padded, none, in_extent, one)",
        "short_mask = Reshape(cut, last)",
        "mask = Cast <to: int = 6> (short_mask)",
        "counted = CumSum(mask, first_axis)",
        "ranks = Mul(counted, mask)",
        "table = Concat <axis: int = 0> (zero, nonzeros)",
        "flat = Gather <axis: int = 0> (table, ranks)",
        "matrix = Reshape(flat, extents)",
    ),
    "dense": ("matrix = Cast <to: int = 1> (weight)",),
}


def transposed(storage: Storage) -> tuple[str, ...]:
    """Statements that make the matrix ``[in_features, out_features]``, as ``transposed``."""
    return (
        integer("one", 1),
        *extent("out_extent", "out_features"),
        *extent("in_extent", "in_features"),
        *_MATRIX[storage],
        "transposed = Transpose <perm: ints = [1, 0]> (matrix)",
    )


def named_matrix(storage: Storage, name: str) -> tuple[str, ...]:
    """Statements that make ``{name}_matrix`` of the ports ``{name}_values`` and so on, in a body
    that has several; ``one``, ``{name}_out_extent`` and ``{name}_in_extent`` are there already."""
    statements = _MATRIX[storage]
    made = [statement.partition(" = ")[0] for statement in statements]
    ports = [port.name for port in WEIGHTS[storage]]
    own = "|".join((*made, *ports, "out_extent", "in_extent"))
    return tuple(re.sub(rf"\b({own})\b(?!:)", rf"{name}_\1", line) for line in statements)


def named_ports(storage: Storage, name: str, rows: str, columns: str) -> tuple[Port, ...]:
    """The ports of a matrix ``[rows, columns]`` that `named_matrix` makes."""

    def shape(port: Port) -> str:
        nonzeros = port.shape.replace("nnz", f"{name}_nnz")
        return nonzeros.replace("out_features", rows).replace("in_features", columns)

    return tuple(
        replace(port, name=f"{name}_{port.name}", shape=shape(port)) for port in WEIGHTS[storage]
    )


def sums(bias: bool) -> list[Step]:
    """The multiplication by ``transposed``, and the bias."""
    steps: list[Step] = [lambda x, y: (f"{y} = MatMul({x}, transposed)",)]
    if bias:
        steps.append(lambda x, y: (f"{y} = Add({x}, bias)",))
    return steps


def linear(storage: Storage, activation: str, bias: bool, residual: bool) -> OnnxOperator:
    """The operator of this kind."""
    steps = sums(bias)
    if activation != "none":
        steps.append(activate(activation))
    if residual:
        steps.append(lambda x, y: (f"{y} = Add({x}, residual)",))
    return OnnxOperator(
        f"Linear{camel(storage)}{'Bias' * bias}{suffix(activation)}{'Add' * residual}",
        "sparse_linear",
        f"A linear layer on a {storage} weight: {_formula(activation, bias, residual)}.",
        (X, *WEIGHTS[storage], *[BIAS] * bias, *[_RESIDUAL] * residual),
        (Y,),
        {
            "in_features": "int",
            "out_features": "int",
            "storage": "string",
            "activation": "string",
        },
        lines(*transposed(storage), *chain("x", steps)),
    )


def _formula(activation: str, bias: bool, residual: bool) -> str:
    inner = f"x @ W.T{' + bias' * bias}"
    outer = inner if activation == "none" else f"{activation}({inner})"
    return f"y = {outer}{' + residual' * residual}"


KINDS = tuple(
    linear(storage, activation, bias, residual)
    for storage, bias, activation, residual in product(
        WEIGHTS, (False, True), ACTIVATIONS, (False, True)
    )
)
