"""Linears, with their weight in the form that files hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.codegen.emit.onnx.translate.node import emit
from sparsify.ops.onnx import active as actives
from sparsify.ops.onnx import linear as linears


def sparse_linear(
    x: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    bias: Any = None,
    activation: str = "none",
    residual: Any = None,
    lanes: bool = False,
) -> Any:
    assert not lanes
    storage = _storage(layout)
    return emit(
        linears.linear(storage, activation, bias is not None, residual is not None),
        [x, *weight, *(value for value in (bias, residual) if value is not None)],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        activation=activation,
    )


def active_linear(
    x: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: Any = None,
    activation: str = "none",
    residual: Any = None,
) -> Any:
    storage = _storage(layout)
    return emit(
        actives.active_linear(storage, activation, bias is not None, residual is not None),
        [x, *weight, *(value for value in (bias, residual) if value is not None)],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        activation=activation,
        active=active,
    )


def gated_linear(
    x: Any,
    gate: Any,
    weight: Sequence[Any],
    layout: str,
    out_features: int,
    in_features: int,
    active: float,
    bias: Any = None,
) -> Any:
    storage = _storage(layout)
    return emit(
        actives.gated_linear(storage, bias is not None),
        [x, *weight, *(() if bias is None else (bias,)), gate],
        in_features=in_features,
        out_features=out_features,
        storage=storage,
        active=active,
    )


def _storage(layout: str) -> linears.Storage:
    return "dense" if layout == "dense" else "csr"
