"""Normalisations."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import Unsupported, operator


@operator("LayerNormalization", since=17)
def layer_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Over all dims from ``axis`` on; the mean and 1 / deviation on demand."""
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)
    axis += x.dim() if axis < 0 else 0
    over = list(x.shape[axis:])
    if list(scale.shape) == over and (bias is None or bias.shape == scale.shape):
        y = F.layer_norm(x, over, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, over, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if not node.wants(1) and not node.wants(2):
        return (y,)
    dims = list(range(axis, x.dim()))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


@operator("RMSNormalization", since=23)
def rms_normalization(node: Node, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)
    over = list(x.shape[axis:])
    if list(scale.shape) == over:
        return F.rms_norm(x, over, scale, epsilon)
    return F.rms_norm(x, over, None, epsilon) * scale


@operator("BatchNormalization", since=7)
def batch_normalization(
    node: Node,
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """By stored statistics; in training by those of the batch, which are then mixed into them."""
    if not node.get("spatial", 1) and x.dim() > 2:
        raise Unsupported("spatial=0, statistics for each element")
    epsilon = node.get("epsilon", 1e-5)
    if not node.get("training_mode", 0):
        if node.wants(1):
            raise Unsupported("statistics as results, from before version 14")
        return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)
    over = [dim for dim in range(x.dim()) if dim != 1]
    own_variance, own_mean = torch.var_mean(x, over, correction=0)
    y = F.batch_norm(x, own_mean, own_variance, scale, bias, training=False, eps=epsilon)
    kept = node.get("momentum", 0.9)
    return (
        y,
        kept * mean + (1 - kept) * own_mean,
        kept * variance + (1 - kept) * own_variance,
    )


@operator("InstanceNormalization", since=6)
def instance_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Over the places of each channel of each sample."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator("GroupNormalization", since=18)
def group_normalization_by_group(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """One scale and bias for each group, version 18 alone."""
    each = x.shape[1] // node.require("num_groups")
    return group_normalization(node, x, scale.repeat_interleave(each), bias.repeat_interleave(each))


@operator("GroupNormalization", since=21)
def group_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """One scale and bias for each channel."""
    return F.group_norm(x, node.require("num_groups"), scale, bias, node.get("epsilon", 1e-5))


@operator("LpNormalization")
def lp_normalization(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Over one dim; a norm of 0 leaves zeros."""
    axis = node.get("axis", -1)
    norm = torch.linalg.vector_norm(x, node.get("p", 2), axis, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, node.get("axes", [0, 2, 3]), correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


@operator("LRN")
def lrn(node: Node, x: torch.Tensor) -> torch.Tensor:
    """By the sum of squares of ``size`` channels around each."""
    size, alpha = node.require("size"), node.get("alpha", 1e-4)
    before, channels = (size - 1) // 2, x.shape[1]
    squares = F.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    total = sum(squares[:, i : i + channels] for i in range(size))
    return x / (node.get("bias", 1.0) + alpha / size * total) ** node.get("beta", 0.75)
