"""Linears whose inputs or outputs are zero for the most part, by kernels that skip those.

Where the weight's layout has no such kernel, as a sparse one, its plain kernel computes them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax

from sparsify.codegen.operators.arguments import arguments_of, flat, shape_of
from sparsify.codegen.operators.linear import call_linear, site_of
from sparsify.codegen.registry import skipping_kernels
from sparsify.contracts import Side
from sparsify.layouts import parse

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_active_linear(node: fx.Node, lowering: Lowering) -> Any:
    a = {**arguments_of(node), "lanes": False}
    skipped = _skipping(a, "inputs", ("x",), lowering)
    return call_linear(a, lowering) if skipped is None else skipped


def convert_gated_linear(node: fx.Node, lowering: Lowering) -> Any:
    plain = {"activation": "none", "residual": None, "lanes": False}
    a = {**arguments_of(node), **plain}
    skipped = _skipping(a, "outputs", ("x", "gate"), lowering)
    if skipped is not None:
        return skipped
    y = call_linear(a, lowering)
    return lowering.block_builder.emit(relax.op.multiply(lowering.tensor(a["gate"]), y))


def _skipping(
    a: dict[str, Any], side: Side, activations: tuple[str, ...], lowering: Lowering
) -> Any:
    """The call of the layout's kernel that skips; None where there is none."""
    layout, site = parse(a["layout"]), site_of(a)
    kernels = skipping_kernels(layout, side)
    if kernels is None:
        return None
    kernel = kernels.skipping_kernel(lowering.target.isa, site, layout)
    leading = shape_of(lowering.tensor(a["x"]))[:-1]
    rows = [flat(lowering, lowering.tensor(a[name])) for name in activations]
    bias, residual = lowering.tensor(a["bias"]), lowering.tensor(a["residual"])
    residual = None if residual is None else flat(lowering, residual)
    weight = [lowering.tensor(w) for w in a["weight"]]
    shape = (shape_of(rows[0])[0], site.out_features)
    y = lowering.call_kernel(kernel, [*rows, *weight, bias, residual], shape)
    return lowering.reshape(y, (*leading, site.out_features))
