"""The operands that linear kernels of all layouts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsify.codegen.kernels.cpu.epilogue import Epilogue
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, arguments
from sparsify.layouts import LANES, Form


class LinearSpec(Protocol):
    """What specifications of linear kernels have in common."""

    @property
    def out_features(self) -> int: ...

    @property
    def in_features(self) -> int: ...

    @property
    def epilogue(self) -> Epilogue: ...


Operands = tuple[Expr, list[Expr], Expr | None, Expr | None, Expr]
"""``x``, the packed tensors, ``bias`` and ``residual`` where the epilogue has them, ``y``."""


def linear_operands(
    spec: LinearSpec, count: Expr, weight: Sequence[Tensor], form: Form
) -> Operands:
    """Declares the parameters of a linear kernel.

    Args:
        count: tokens in rows, or groups of 16 in lanes.
        weight: the packed tensors.
    """
    lanes = (LANES,) if form == "lanes" else ()
    features = (count, spec.out_features, *lanes)
    x, *packed, bias, residual, y = arguments(
        Tensor("x", (count, spec.in_features, *lanes)),
        *weight,
        Tensor("bias", (spec.out_features,)) if spec.epilogue.bias else None,
        Tensor("residual", features) if spec.epilogue.residual else None,
        Tensor("y", features),
    )
    return x, packed, bias, residual, y
