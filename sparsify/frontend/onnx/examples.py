"""Example inputs of an ONNX model, made from its declared inputs."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.model import Input

BATCH, TOKENS = 2, 128
"""Sizes of dynamic dims: of the first and of all others."""


def example(declared: Input) -> torch.Tensor:
    """A tensor of the declared shape and type."""
    shape = [
        size if isinstance(size, int) else BATCH if dim == 0 else TOKENS
        for dim, size in enumerate(declared.dims)
    ]
    if declared.dtype.is_floating_point:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(declared.dtype)
    return torch.ones(shape, dtype=declared.dtype)
