"""How tensors must lie in memory for kernels to read and write them where they are."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 64
"""Bytes, at a multiple of which a tensor must begin."""


def in_place(tensor: torch.Tensor) -> bool:
    """Whether kernels can use the tensor as it lies, without a copy."""
    if not tensor.numel():
        return tensor.stride() == _compact(tensor)
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own that kernels can use."""
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, _compact(tensor), dtype=tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def _compact(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides that kernels expect of an empty tensor, where PyTorch takes 0 for 1."""
    return tuple(math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim()))


def overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the memory that two tensors span has a byte in common."""
    (begin, end), (other_begin, other_end) = _span(left), _span(right)
    return begin < other_end and other_begin < end


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return begin, begin + (last + 1) * tensor.element_size()
