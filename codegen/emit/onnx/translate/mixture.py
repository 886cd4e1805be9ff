"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify.codegen.emit.onnx.translate.node import emit
from sparsify.ops.onnx import experts as mixtures
from sparsify.ops.onnx import route as routes
from sparsify.routers import parse as parse_router


def route(logits: Any, router: str, parameters: Sequence[Any]) -> Any:
    operator, attributes = routes.operator_of(parse_router(router), int(logits.shape[1]))
    return emit(operator, [logits, *parameters], **attributes)


def experts(
    x: Any,
    experts: Any,
    weights: Any,
    up: Sequence[Any],
    down: Sequence[Any],
    bias: Sequence[Any],
    up_layout: str,
    down_layout: str,
    count: int,
    out_features: int,
    hidden: int,
    in_features: int,
    activation: str,
    gated: bool = True,
) -> Any:
    assert up_layout == down_layout == "dense"
    return emit(
        mixtures.experts("dense", gated, activation, bool(bias)),
        [x, experts, weights, *up, *down, *bias],
        count=count,
        out_features=out_features,
        hidden=hidden,
        in_features=in_features,
        storage="dense",
        activation=activation,
    )
