"""Normalisations that ONNX Runtime's optimiser fuses with what comes before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import MICROSOFT, operator


@operator("SimplifiedLayerNormalization")
def simplified_layer_normalization(
    node: Node, x: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """RMSNorm; ONNX Runtime has it in the domain of ONNX itself."""
    axis, epsilon = node.get("axis", -1) % x.dim(), node.get("epsilon", 1e-5)
    y = F.rms_norm(x, list(x.shape[axis:]), scale, epsilon)
    if not node.wants(1):
        return (y,)
    squares = (x * x).mean(tuple(range(axis, x.dim())), keepdim=True)
    return y, torch.rsqrt(squares + epsilon)


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_normalization(
    node: Node,
    x: torch.Tensor,
    skip: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    total = _sum(x, skip, bias)
    epsilon = node.get("epsilon", 1e-5)
    y = F.rms_norm(total, list(scale.shape), scale, epsilon)
    deviation = None
    if node.wants(2):
        deviation = torch.rsqrt((total * total).mean(-1, keepdim=True) + epsilon)
    return y, None, deviation, total


@operator("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    node: Node,
    x: torch.Tensor,
    skip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The normalised sum; on demand mean, 1 / deviation, and the sum itself."""
    total = _sum(x, skip, bias)
    epsilon = node.get("epsilon", 1e-12)
    y = F.layer_norm(total, list(scale.shape), scale, shift, epsilon)
    mean = deviation = None
    if node.wants(1) or node.wants(2):
        variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
        deviation = torch.rsqrt(variance + epsilon)
    return y, mean, deviation, total


def _sum(x: torch.Tensor, skip: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The bias goes first: it belongs to the linear operator before."""
    return (x if bias is None else x + bias) + skip


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(
    node: Node,
    ids: torch.Tensor,
    segments: torch.Tensor | None,
    words: torch.Tensor,
    positions: torch.Tensor,
    kinds: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """BERT's embeddings; also how many tokens of each row count, and the sum on demand."""
    length = ids.shape[1]
    at = positions[:length].unsqueeze(0) if places is None else F.embedding(places, positions)
    total = F.embedding(ids, words) + at
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments, kinds)
    y = F.layer_norm(total, list(scale.shape), scale, shift, node.get("epsilon", 1e-12))
    if mask is None:
        counts = torch.zeros(ids.shape[0], dtype=torch.int32)
    else:
        counts = (mask == 1).sum(1).to(torch.int32)
    return y, counts, total
