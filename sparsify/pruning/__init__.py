"""Pruning: one file per method; `prune` applies any of them to a copy of a model."""

from sparsify.pruning.base import LayerSparsity, Pruner, PruneReport, prune
from sparsify.pruning.magnitude import Unstructured
from sparsify.pruning.sites import PrunableWeight, prunable_weights

__all__ = [
    "LayerSparsity",
    "PrunableWeight",
    "PruneReport",
    "Pruner",
    "Unstructured",
    "prunable_weights",
    "prune",
]
