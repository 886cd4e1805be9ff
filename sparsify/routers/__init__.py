"""Routers of mixtures of experts, one file each; importing the package registers them."""

from sparsify.routers.base import (
    ROUTERS,
    UNUSED,
    Candidate,
    Router,
    Routes,
    Seen,
    parse,
    register,
    router_names,
    used,
)
from sparsify.routers.plain import TopK
from sparsify.routers.recognition import fitting, gates_of, recognise
from sparsify.routers.relu_norm import ReluNorm
from sparsify.routers.sigmoid import SigmoidTopK
from sparsify.routers.softmax import SoftmaxTopK
from sparsify.routers.temperature import Temperature
from sparsify.routers.threshold import Threshold
from sparsify.routers.tree import Tree

__all__ = [
    "ROUTERS",
    "UNUSED",
    "Candidate",
    "ReluNorm",
    "Router",
    "Routes",
    "Seen",
    "SigmoidTopK",
    "SoftmaxTopK",
    "Temperature",
    "Threshold",
    "TopK",
    "Tree",
    "fitting",
    "gates_of",
    "parse",
    "recognise",
    "register",
    "router_names",
    "used",
]
