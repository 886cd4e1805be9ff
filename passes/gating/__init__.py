"""Recipes that skip what a network does not activate, one file a method."""

from sparsify.passes.gating.cats import Cats
from sparsify.passes.gating.recipe import Gating

__all__ = ["Cats", "Gating"]
