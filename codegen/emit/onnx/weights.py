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


def smallest(*weights: torch.Tensor) -> tuple[StoredWeight, ...]:
    """The form of float32 matrices, the same for all, with the fewest bytes; of equal ones, the
    plainest.

    Values are bfloat16 where that is all there is of them. Zeros of either sign are dropped by
    csr and bitmap.
    """
    sizes = [_sizes(weight) for weight in weights]
    common = [form for form in sizes[0] if all(form in own for own in sizes)]
    storage = min(common, key=lambda form: sum(own[form] for own in sizes))
    return tuple(_stored(weight, storage) for weight in weights)


def _sizes(weight: torch.Tensor) -> dict[Storage, int]:
    """Bytes of each form that there is."""
    rows, columns = weight.shape
    nnz, value_type = int(weight.count_nonzero()), _value_type(weight)
    sizes: dict[Storage, int] = {"dense": rows * columns * value_type.itemsize}
    if nnz <= _LARGEST:  # ranks and row offsets are int32
        sizes["bitmap"] = rows * -(-columns // 8) + nnz * value_type.itemsize
        sizes["csr"] = nnz * (value_type.itemsize + _column_type(columns).itemsize) + 4 * (rows + 1)
    return sizes


def _stored(weight: torch.Tensor, storage: Storage) -> StoredWeight:
    nonzero, value_type = weight != 0, _value_type(weight)
    if storage == "dense":
        tensors = {"weight": weight.to(value_type)}
    elif storage == "bitmap":
        tensors = {"bits": _bits(nonzero), "values": weight[nonzero].to(value_type)}
    else:
        tensors = {
            "values": weight[nonzero].to(value_type),
            "columns": nonzero.nonzero()[:, 1].to(_column_type(weight.shape[1])),
            "row_offsets": _row_offsets(nonzero),
        }
    return StoredWeight(storage, tensors, int(nonzero.sum()), (weight.shape[0], weight.shape[1]))


def _value_type(weight: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if exact_in_bfloat16(weight) else torch.float32


def _column_type(columns: int) -> torch.dtype:
    """The narrowest type that numbers so many columns."""
    return next(t for t in _COLUMN_TYPES if columns - 1 <= torch.iinfo(t).max)


def _bits(nonzero: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(nonzero.numpy(), axis=1, bitorder="little"))


def _row_offsets(nonzero: torch.Tensor) -> torch.Tensor:
    offsets = torch.zeros(nonzero.shape[0] + 1, dtype=torch.int32)
    offsets[1:] = nonzero.sum(1).cumsum(0)
    return offsets
