"""Routers of mixtures of experts, one file each; importing the package registers them."""

from sparsify.routers.base import (
    ROUTERS,
    UNUSED,
    Router,
    Routes,
    parse,
    register,
    router_names,
    used,
)
from sparsify.routers.plain import TopK
from sparsify.routers.relu_norm import ReluNorm
from sparsify.routers.sigmoid import SigmoidTopK
from sparsify.routers.softmax import SoftmaxTopK
from sparsify.routers.temperature import Temperature
from sparsify.routers.threshold import Threshold
from sparsify.routers.tree import Tree

__all__ = [
    "ROUTERS",
    "UNUSED",
    "ReluNorm",
    "Router",
    "Routes",
    "SigmoidTopK",
    "SoftmaxTopK",
    "Temperature",
    "Threshold",
    "TopK",
    "Tree",
    "parse",
    "register",
    "router_names",
    "used",
]
