"""Normalisations over groups of elements, but for those over the last dims that models live on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator
from sparsify.frontend.onnx.tensors import torch_type


@operator("InstanceNormalization")
def instance_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    dims = tuple(range(2, x.dim()))
    return _affine(_standard(x, dims, node.get("epsilon", 1e-5)), scale, bias)


def _standard(x: torch.Tensor, dims: tuple[int, ...], epsilon: float) -> torch.Tensor:
    """Mean zero and variance one over these dims."""
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + epsilon)


def _affine(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    shape = (-1,) + (1,) * (x.dim() - 2)
    return x * scale.reshape(shape) + bias.reshape(shape)


@operator("GroupNormalization", since=18)
def group_normalization_by_group(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Until version 21 scale and bias are given for each group."""
    per_group = x.shape[1] // node.require("num_groups")
    scale, bias = (t.reshape(-1, 1).expand(-1, per_group).reshape(-1) for t in (scale, bias))
    return _group_normalization(node, x, scale, bias)


@operator("GroupNormalization", since=21)
def group_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return _group_normalization(node, x, scale, bias)


def _group_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    groups, epsilon = node.require("num_groups"), node.get("epsilon", 1e-5)
    return F.group_norm(x, groups, scale, bias, epsilon)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, x: torch.Tensor) -> torch.Tensor:
    dims = tuple(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(dims, keepdim=True)
    deviation = (centred * centred).mean(dims, keepdim=True).sqrt()
    return centred / (deviation + 1e-9)


@operator("LRN")
def lrn(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Divides by the squares of the neighbouring channels."""
    size, channels = node.require("size"), x.shape[1]
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = x * x
    pads = [0, 0] * (x.dim() - 2) + [before, after]
    padded = F.pad(squares, pads)
    total = padded.narrow(1, 0, channels)
    for start in range(1, size):
        total = total + padded.narrow(1, start, channels)
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return x / (total * (alpha / size) + bias) ** beta


@operator("LpNormalization")
def lp_normalization(node: Node, x: torch.Tensor) -> torch.Tensor:
    """A zero vector stays zero."""
    axis, p = node.get("axis", -1), node.get("p", 2)
    if p == 1:
        length = x.abs().sum(axis, keepdim=True)
    else:
        length = (x * x).sum(axis, keepdim=True).sqrt()
    return x / torch.where(length == 0, 1.0, length)


@operator("RMSNormalization", since=23)
def rms_normalization(node: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    axis = node.get("axis", -1) % x.dim()
    return rms_norm(
        x, scale, axis, node.get("epsilon", 1e-5), torch_type(node.get("stash_type", 1))
    )


def rms_norm(
    x: torch.Tensor, scale: torch.Tensor, axis: int, epsilon: float, stash: torch.dtype
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the dims from ``axis`` on."""
    shape = list(x.shape[axis:])
    if x.dtype == stash and list(scale.shape) == shape:
        return F.rms_norm(x, shape, scale, epsilon)
    wide = x.to(stash)
    mean = (wide * wide).mean(tuple(range(axis, x.dim())), keepdim=True)
    normal = (wide * torch.rsqrt(mean + epsilon)).to(x.dtype)
    return normal * scale
