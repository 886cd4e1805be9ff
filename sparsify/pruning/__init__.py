"""Pruning: one file per method; `prune` applies any of them to a copy of a model."""

from sparsify.pruning.base import LayerSparsity, Pruner, PruneReport, prune
from sparsify.pruning.magnitude import Unstructured
from sparsify.pruning.rounding import LayerRounding, RoundingReport, RoundWeights
from sparsify.pruning.sites import PrunableWeight, prunable_weights

__all__ = [
    "LayerRounding",
    "LayerSparsity",
    "PrunableWeight",
    "PruneReport",
    "Pruner",
    "RoundWeights",
    "RoundingReport",
    "Unstructured",
    "prunable_weights",
    "prune",
]
