"""log(1 + x) by the C library, which keeps its digits near zero; TVM's importer writes the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from tvm import relax, te, tirx

from sparsify.codegen.operators.arguments import arguments_of

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_log1p(node: fx.Node, lowering: Lowering) -> Any:
    x, dtype = lowering.tensor(node.args[0]), str(lowering.type_of(node.meta["val"]).dtype)
    if str(x.ty.dtype) != dtype:  # of integers
        x = lowering.block_builder.emit(relax.op.astype(x, dtype))
    return lowering.block_builder.emit_te(_log1p, x)


def convert_softplus(node: fx.Node, lowering: Lowering) -> Any:
    """log(1 + exp(beta x)) / beta, and x itself from the threshold on."""
    a = arguments_of(node)
    x, dtype = lowering.tensor(a["self"]), str(lowering.type_of(node.meta["val"]).dtype)
    beta, threshold = (relax.const(float(a[name]), dtype) for name in ("beta", "threshold"))
    builder = lowering.block_builder
    scaled = x if a["beta"] == 1 else builder.emit(relax.op.multiply(x, beta))
    y = builder.emit_te(_log1p, builder.emit(relax.op.exp(scaled)))
    y = y if a["beta"] == 1 else relax.op.divide(y, beta)
    return builder.emit(relax.op.where(relax.op.greater(scaled, threshold), x, y))


def _log1p(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: tirx.log1p(x(*i)), "log1p")
