"""Routers and experts."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx.experts import experts
from sparsify.ops.onnx.linear import WEIGHTS
from sparsify.ops.onnx.route import operator_of
from sparsify.routers import parse
from tests.ops.domain.case import TOKENS, Case, call, of
from tests.ops.domain.linear import packed
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
    kinds = product(WEIGHTS, (False, True), ACTIVATIONS, (False, True))
    for number, (storage, gated, activation, bias) in enumerate(kinds):
        x = torch.randn(*TOKENS[number % len(TOKENS)], 9)
        chosen, weights = routes(x.numel() // 9)
        rows = 22 if gated else 11
        share = 0.4 if number % 5 else 0.0
        up, down = (
            torch.randn(shape) * (torch.rand(shape) < share) for shape in ((5 * rows, 9), (35, 11))
        )
        inputs = {
            "x": x,
            "experts": chosen,
            "weights": weights,
            **{f"up_{name}": tensor for name, tensor in packed(up, storage).items()},
            **{f"down_{name}": tensor for name, tensor in packed(down, storage).items()},
            "up_bias": torch.randn(5, rows),
            "down_bias": torch.randn(5, 7),
        }
        biases = [inputs["up_bias"], inputs["down_bias"]] if bias else []
        y = call(
            "experts", x, chosen, weights, [up], [down], biases,
            "dense", "dense", *sizes.values(), activation, gated,
        )  # fmt: skip
        operator = experts(storage, gated, activation, bias)
        attributes = {**sizes, "storage": storage, "activation": activation}
        yield Case(operator, of(operator, inputs), attributes, (y,))
