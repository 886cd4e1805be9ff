"""Sparse linears, by the kernels of their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.codegen.operators.arguments import (
    arguments_of,
    from_lanes,
    product,
    shape_of,
    to_lanes,
)
from sparsify.codegen.registry import LinearSite, linear_kernels
from sparsify.layouts import LANES, parse
from sparsify.ops import expected_tokens

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_sparse_linear(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, bias, residual = (lowering.tensor(a[name]) for name in ("x", "bias", "residual"))
    layout = parse(a["layout"])
    site = LinearSite(
        a["out_features"],
        a["in_features"],
        bias is not None,
        a["activation"],
        residual is not None,
    )
    kernels = linear_kernels(layout, LANES if a["lanes"] else expected_tokens(a["x"].meta["val"]))
    kernel = kernels.kernel(lowering.target.isa, site, layout)
    weight = [lowering.tensor(w) for w in a["weight"]]
    if kernels.form == "rows":
        groups = shape_of(x)[0]
        if a["lanes"]:  # every lane is a token, those past the last included
            x, residual = (
                v if v is None else from_lanes(lowering, v, (groups * LANES,))
                for v in (x, residual)
            )
        leading = shape_of(x)[:-1]
        tokens = product(leading)
        x, residual = (
            v if v is None else lowering.reshape(v, (tokens, shape_of(v)[-1]))
            for v in (x, residual)
        )
        shape = (tokens, site.out_features)
        y = lowering.call_kernel(kernel, [x, *weight, bias, residual], shape)
        if a["lanes"]:
            return to_lanes(lowering, y, a["x"].meta["val"].shape[0])
        return lowering.reshape(y, (*leading, site.out_features))
    leading = shape_of(x)[:-1]
    if not a["lanes"]:
        x = to_lanes(lowering, x)
        residual = None if residual is None else to_lanes(lowering, residual)
    y = lowering.call_kernel(
        kernel, [x, *weight, bias, residual], (shape_of(x)[0], site.out_features, LANES)
    )
    return y if a["lanes"] else from_lanes(lowering, y, leading)
