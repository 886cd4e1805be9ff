"""Storage layouts of weights, one file each; importing the package registers them."""

from sparsify.layouts.base import (
    FEW_TOKENS,
    LANES,
    Form,
    Layout,
    form_of,
    layout_names,
    parse,
    register,
)
from sparsify.layouts.bitmap import Bitmap
from sparsify.layouts.csr import Csr
from sparsify.layouts.dense import Dense, PackedDense
from sparsify.layouts.dense_columns import DenseColumns
from sparsify.layouts.sell import Sell
from sparsify.layouts.stack import Stack
from sparsify.layouts.stats import WeightStats

__all__ = [
    "FEW_TOKENS",
    "LANES",
    "Bitmap",
    "Csr",
    "Dense",
    "DenseColumns",
    "Form",
    "Layout",
    "PackedDense",
    "Sell",
    "Stack",
    "WeightStats",
    "form_of",
    "layout_names",
    "parse",
    "register",
]
