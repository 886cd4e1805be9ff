"""Linears whose inputs or outputs are zero for the most part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax

from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.operators.linear import call_linear

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_active_linear(node: fx.Node, lowering: Lowering) -> Any:
    return call_linear({**arguments_of(node), "lanes": False}, lowering)


def convert_gated_linear(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    plain = {**a, "activation": "none", "residual": None, "lanes": False}
    y = call_linear(plain, lowering)
    return lowering.block_builder.emit(relax.op.multiply(lowering.tensor(a["gate"]), y))
