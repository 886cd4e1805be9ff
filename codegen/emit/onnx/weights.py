"""How a weight is stored in an ONNX file: the smallest of three forms, and nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsify.layouts.stats import exact_in_bfloat16
from sparsify.ops.onnx.linear import Storage

_COLUMN_TYPES = (torch.uint8, torch.uint16, torch.int32)
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the inputs of a linear hold it, by the names of the operator's ports."""

    storage: Storage
    tensors: dict[str, torch.Tensor]
    nnz: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Of the matrix in float32."""
        return 4 * self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def value_type(self) -> str:
        return str(self.tensors["weight" if self.storage == "dense" else "values"].dtype)[6:]

    def to_dict(self) -> dict[str, Any]:
        return {
            "storage": self.storage,
            "values": self.value_type,
            "shape": list(self.shape),
            "nnz": self.nnz,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_nbytes,
        }


def smallest(weight: torch.Tensor) -> StoredWeight:
    """The form of a float32 matrix with the fewest bytes; of equal ones, the plainest.

    Values are bfloat16 where that is all there is of them. Zeros of either sign are dropped by
    csr and bitmap.
    """
    rows, columns = weight.shape
    nonzero = weight != 0
    nnz = int(nonzero.sum())
    value_type = torch.bfloat16 if exact_in_bfloat16(weight) else torch.float32
    column_type = _column_type(columns)
    sizes: dict[Storage, int] = {"dense": rows * columns * value_type.itemsize}
    if nnz <= _LARGEST:  # ranks and row offsets are int32
        sizes["bitmap"] = rows * -(-columns // 8) + nnz * value_type.itemsize
        sizes["csr"] = nnz * (value_type.itemsize + column_type.itemsize) + 4 * (rows + 1)
    storage = min(sizes, key=lambda form: sizes[form])
    if storage == "dense":
        tensors = {"weight": weight.to(value_type)}
    elif storage == "bitmap":
        tensors = {"bits": _bits(nonzero), "values": weight[nonzero].to(value_type)}
    else:
        tensors = {
            "values": weight[nonzero].to(value_type),
            "columns": nonzero.nonzero()[:, 1].to(column_type),
            "row_offsets": _row_offsets(nonzero),
        }
    return StoredWeight(storage, tensors, nnz, (rows, columns))


def _column_type(columns: int) -> torch.dtype:
    """The narrowest type that numbers so many columns."""
    return next(t for t in _COLUMN_TYPES if columns - 1 <= torch.iinfo(t).max)


def _bits(nonzero: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(nonzero.numpy(), axis=1, bitorder="little"))


def _row_offsets(nonzero: torch.Tensor) -> torch.Tensor:
    offsets = torch.zeros(nonzero.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = nonzero.sum(1).cumsum(0)
    return offsets
