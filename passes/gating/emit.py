"""The nodes that gating writes: gates, and linears that skip what is zero."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsify import ops
from sparsify.gates import Calibrated
from sparsify.passes.graph import arguments, aten
from sparsify.rewriter import Rewriter


def gate(rewriter: Rewriter, x: fx.Node, calibrated: Calibrated, weight: str) -> fx.Node:
    """``x`` gated; the parameters are stored beside the weight of that name."""
    spec = calibrated.gate.spec
    named = zip(calibrated.gate.parameters, calibrated.parameters, strict=True)
    parameters = [rewriter.add_weight(f"{weight}:{spec}.{name}", t) for name, t in named]
    return rewriter.call(ops.gate.overload, (x, spec, parameters))


def active_linear(rewriter: Rewriter, linear: fx.Node, active: float, **changed: Any) -> fx.Node:
    """The linear with operands changed, of whose inputs that share is not zero."""
    return rewriter.call(
        ops.sparse_linear.overload, tuple({**arguments(linear), **changed}.values())
    )


def gated_linear(
    rewriter: Rewriter, linear: fx.Node, gate: fx.Node, active: float, **changed: Any
) -> fx.Node:
    """``gate`` times the linear with operands changed; that share of the gate is not zero."""
    up = rewriter.call(ops.sparse_linear.overload, tuple({**arguments(linear), **changed}.values()))
    return rewriter.call(aten.mul.Tensor, (gate, up))
