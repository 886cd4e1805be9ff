"""Storage layouts of weights, one file each; importing the package registers them."""

from sparsify.layouts.base import LANES, Layout, layout_names, parse, register
from sparsify.layouts.csr import Csr
from sparsify.layouts.dense import Dense, PackedDense
from sparsify.layouts.sell import Sell
from sparsify.layouts.stats import WeightStats

__all__ = [
    "LANES",
    "Csr",
    "Dense",
    "Layout",
    "PackedDense",
    "Sell",
    "WeightStats",
    "layout_names",
    "parse",
    "register",
]
