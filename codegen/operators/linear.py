"""Sparse linears, by the kernels of their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify import ops
from sparsify.codegen.operators.arguments import (
    arguments_of,
    from_lanes,
    product,
    shape_of,
    to_lanes,
)
from sparsify.codegen.registry import (
    GatedKernels,
    Kernel,
    LinearKernels,
    LinearSite,
    linear_kernels,
)
from sparsify.layouts import LANES, Layout, parse
from sparsify.ops import expected_tokens

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_sparse_linear(node: fx.Node, lowering: Lowering) -> Any:
    if gated_kernel(node, lowering) is not None:
        return None  # nothing else reads it; its gate calls the kernel of both
    return call_linear(arguments_of(node), lowering)


def call_linear(a: dict[str, Any], lowering: Lowering) -> Any:
    """Calls the layout's kernel with the arguments of a ``sparse_linear``."""
    x, bias, residual = (lowering.tensor(a[name]) for name in ("x", "bias", "residual"))
    layout, site = parse(a["layout"]), site_of(a)
    kernels = _kernels(a, layout)
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
    extents = (shape_of(x)[0], site.out_features, LANES)
    y = lowering.call_kernel(kernel, [x, *weight, bias, residual], extents)
    return y if a["lanes"] else from_lanes(lowering, y, leading)


def convert_linear_and_gate(node: fx.Node, kernel: Kernel, lowering: Lowering) -> Any:
    """Calls the kernel that computes a linear and the gate on its result."""
    a = arguments_of(node)
    x, bias = lowering.tensor(a["x"]), lowering.tensor(a["bias"])
    weight = [lowering.tensor(w) for w in a["weight"]]
    shape = (shape_of(x)[0], a["out_features"] // 2, LANES)
    return lowering.call_kernel(kernel, [x, *weight, bias], shape)


def gated_kernel(node: fx.Node, lowering: Lowering) -> Kernel | None:
    """The kernel that computes a node, if a linear, and the gate on its result, if there is one."""
    if node.target != ops.sparse_linear.overload:
        return None
    a = arguments_of(node)
    site, users = site_of(a), list(node.users)
    gated = len(users) == 1 and users[0].target == ops.gated.overload
    if not gated or not a["lanes"] or site.activation != "none" or site.residual:
        return None
    layout, activation = parse(a["layout"]), arguments_of(users[0])["activation"]
    kernels = _kernels(a, layout)
    if not isinstance(kernels, GatedKernels):
        return None
    return kernels.gated_kernel(lowering.target.isa, site, layout, activation)


def site_of(a: dict[str, Any]) -> LinearSite:
    return LinearSite(
        a["out_features"],
        a["in_features"],
        a["bias"] is not None,
        a["activation"],
        a["residual"] is not None,
    )


def _kernels(a: dict[str, Any], layout: Layout) -> LinearKernels:
    return linear_kernels(layout, LANES if a["lanes"] else expected_tokens(a["x"].meta["val"]))
