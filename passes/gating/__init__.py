"""Recipes that skip what a network does not activate, one file a method."""

from sparsify.passes.gating.cats import Cats
from sparsify.passes.gating.chess import Chess
from sparsify.passes.gating.exact_zeros import ExactZeros
from sparsify.passes.gating.r_sparse import RSparse
from sparsify.passes.gating.recipe import Gating
from sparsify.passes.gating.spark_top_k import SparkTopK
from sparsify.passes.gating.teal import Teal
from sparsify.passes.gating.top_k import TopK
from sparsify.passes.gating.wina import Wina

__all__ = [
    "Cats",
    "Chess",
    "ExactZeros",
    "Gating",
    "RSparse",
    "SparkTopK",
    "Teal",
    "TopK",
    "Wina",
]
