"""Linears with inputs or outputs that are mostly zero, of every storage and kind."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx.active import active_linear, gated_linear
from sparsify.ops.onnx.linear import WEIGHTS
from tests.ops.domain.case import IN, OUT, Case, call, of
from tests.ops.domain.linear import packed

TOKENS = [(1, 1), (2, 3), (2, 17)]


def cases() -> Iterator[Case]:
    kinds = product(WEIGHTS, ACTIVATIONS, (False, True), (False, True))
    for number, (storage, activation, bias, residual) in enumerate(kinds):
        tokens = TOKENS[number % len(TOKENS)]
        weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.7)
        x = torch.randn(*tokens, IN) * (torch.rand(*tokens, IN) < (0.3 if number % 5 else 0.0))
        b, r = torch.randn(OUT), torch.randn(*tokens, OUT)
        y = call(
            "active_linear", x, [weight], "dense", OUT, IN, 0.25,
            b if bias else None, activation, r if residual else None,
        )  # fmt: skip
        inputs = {"x": x, **packed(weight, storage), "bias": b, "residual": r}
        operator = active_linear(storage, activation, bias, residual)
        attributes = {"in_features": IN, "out_features": OUT, "storage": storage}
        attributes |= {"activation": activation, "active": 0.25}
        yield Case(operator, of(operator, inputs), attributes, (y,))
    for (storage, bias), tokens in product(product(WEIGHTS, (False, True)), TOKENS):
        weight, b = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.7), torch.randn(OUT)
        x, gate = torch.randn(*tokens, IN), torch.randn(*tokens, OUT)
        gate = gate * (torch.rand(*tokens, OUT) < 0.3)
        y = call("gated_linear", x, gate, [weight], "dense", OUT, IN, 0.25, b if bias else None)
        operator = gated_linear(storage, bias)
        inputs = {"x": x, "gate": gate, **packed(weight, storage), "bias": b}
        attributes = {"in_features": IN, "out_features": OUT, "storage": storage, "active": 0.25}
        yield Case(operator, of(operator, inputs), attributes, (y,))
