"""The nodes that gating writes: gates, and linears that skip what is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.gates import Calibrated
from sparsify.layouts import Dense
from sparsify.passes.graph import arguments
from sparsify.passes.sites import pack
from sparsify.rewriter import Rewriter


def gate(rewriter: Rewriter, x: fx.Node, calibrated: Calibrated | None, weight: str) -> fx.Node:
    """``x`` gated, if by anything; the parameters are stored beside the weight of that name."""
    if calibrated is None:
        return x
    spec = calibrated.gate.spec
    named = zip(calibrated.gate.parameters, calibrated.parameters, strict=True)
    parameters = [rewriter.add_weight(f"{weight}:{spec}.{name}", t) for name, t in named]
    return rewriter.call(ops.gate.overload, (x, spec, parameters))


def active_linear(rewriter: Rewriter, linear: fx.Node, active: float, **changed: Any) -> fx.Node:
    """The linear with operands changed, of whose inputs that share is not zero."""
    o = {**arguments(linear), **changed}
    return rewriter.call(
        ops.active_linear.overload,
        (
            *(o["x"], o["weight"], o["layout"], o["out_features"], o["in_features"], active),
            *(o["bias"], o["activation"], o["residual"]),
        ),
    )


def gated_linear(
    rewriter: Rewriter, linear: fx.Node, gate: fx.Node, active: float, **changed: Any
) -> fx.Node:
    """``gate`` times the linear with operands changed; that share of the gate is not zero."""
    o = {**arguments(linear), **changed}
    return rewriter.call(
        ops.gated_linear.overload,
        (
            *(o["x"], gate, o["weight"], o["layout"], o["out_features"], o["in_features"]),
            *(active, o["bias"]),
        ),
    )


def dense_linear(
    rewriter: Rewriter,
    x: fx.Node,
    name: str,
    weight: torch.Tensor,
    residual: fx.Node | None = None,
) -> fx.Node:
    """``x @ weight.T + residual`` with a new weight of that name."""
    (stored,) = (rewriter.add_weight(n, t) for n, t in pack(weight, name, Dense()).items())
    return rewriter.call(
        ops.sparse_linear.overload,
        (x, [stored], Dense().spec, *weight.shape, None, "none", residual),
    )
