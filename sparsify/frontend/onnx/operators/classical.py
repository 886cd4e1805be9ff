"""Operators of ai.onnx.ml, of models that are no networks, as far as they are arithmetic."""

from __future__ import annotations

import torch

from sparsify.frontend.onnx.node import Node
from sparsify.frontend.onnx.registry import operator

CLASSICAL = "ai.onnx.ml"


@operator("ArrayFeatureExtractor", domain=CLASSICAL)
def array_feature_extractor(node: Node, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Columns of the last dim."""
    return x.index_select(-1, indices.reshape(-1).long())


@operator("Binarizer", domain=CLASSICAL)
def binarizer(node: Node, x: torch.Tensor) -> torch.Tensor:
    return (x > node.get("threshold", 0.0)).to(x.dtype)
