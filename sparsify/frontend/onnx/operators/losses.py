"""Losses over classes, of a model that was exported with its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator


@operator("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss(
    node: Node, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    return _loss(node, x, target, weight)


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(
    node: Node, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    logarithms = F.log_softmax(x, 1)
    return _loss(node, logarithms, target, weight), logarithms


def _loss(
    node: Node, x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """``-weight[target] * x[target]``, zero where the target is ``ignore_index``, and reduced.

    Args:
        x: logarithms, ``[batch, classes, ...]``.
        target: classes, ``[batch, ...]``.
    """
    ignored = node.get("ignore_index")
    target = target.long()
    counted = None
    if ignored is not None:
        counted = target != ignored
        target = torch.where(counted, target, 0)
    loss = -x.gather(1, target.unsqueeze(1)).squeeze(1)
    weights = None if weight is None else weight[target]
    if counted is not None:
        ones = torch.ones_like(loss) if weights is None else weights
        weights = torch.where(counted, ones, 0.0)
    if weights is not None:
        loss = loss * weights
    reduction = node.get("reduction", "mean")
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weights is None else loss.sum() / weights.sum()
