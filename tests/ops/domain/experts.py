"""Routers and experts."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx.experts import experts
from sparsify.ops.onnx.route import operator_of
from sparsify.routers import parse
from tests.ops.domain.case import TOKENS, Case, call, of
from tests.ops.eager.experts import routes
from tests.ops.eager.route import ROUTERS, parameters_of


def cases() -> Iterator[Case]:
    for spec, width in ROUTERS:
        router, parameters = parse(spec), parameters_of(spec, width)
        operator, attributes = operator_of(router, width)
        for tokens in (1, 9):
            logits = torch.randn(tokens, width)
            inputs = {"logits": logits, **dict(zip(router.parameters, parameters, strict=True))}
            yield Case(
                operator, of(operator, inputs), attributes, call("route", logits, spec, parameters)
            )
    sizes = {"count": 5, "out_features": 7, "hidden": 11, "in_features": 9}
    kinds = product((False, True), ACTIVATIONS, (False, True))
    for number, (gated, activation, bias) in enumerate(kinds):
        x = torch.randn(*TOKENS[number % len(TOKENS)], 9)
        chosen, weights = routes(x.numel() // 9)
        rows = 22 if gated else 11
        inputs = {
            "x": x,
            "experts": chosen,
            "weights": weights,
            "up": torch.randn(5 * rows, 9),
            "down": torch.randn(5 * 7, 11),
            "up_bias": torch.randn(5, rows),
            "down_bias": torch.randn(5, 7),
        }
        biases = [inputs["up_bias"], inputs["down_bias"]] if bias else []
        y = call(
            "experts", x, chosen, weights, [inputs["up"]], [inputs["down"]], biases,
            "dense", "dense", *sizes.values(), activation, gated,
        )  # fmt: skip
        operator = experts(gated, activation, bias)
        yield Case(operator, of(operator, inputs), {**sizes, "activation": activation}, (y,))
