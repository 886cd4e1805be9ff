"""Linears of every storage and kind."""

from collections.abc import Iterator
from itertools import product

import torch

from sparsify.ops import ACTIVATIONS
from sparsify.ops.onnx.linear import WEIGHTS, linear
from tests.ops.domain.case import IN, OUT, TOKENS, Case, call, of


def packed(weight: torch.Tensor, storage: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight, element by element from the domain's description."""
    nonzeros = [(r, c) for r, c in product(*map(range, weight.shape)) if weight[r, c]]
    values = torch.tensor([float(weight[place]) for place in nonzeros])
    if storage == "csr":
        ends = [sum(r < row for r, _ in nonzeros) for row in range(weight.shape[0] + 1)]
        columns = torch.tensor([c for _, c in nonzeros], dtype=torch.uint8)
        offsets = torch.tensor(ends, dtype=torch.int32)
        return {"values": values, "columns": columns, "row_offsets": offsets}
    if storage == "bitmap":
        bits = torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)
        for r, c in nonzeros:
            bits[r, c // 8] |= 1 << c % 8
        return {"bits": bits, "values": values}
    return {"weight": weight}


def cases() -> Iterator[Case]:
    kinds = product(WEIGHTS, ACTIVATIONS, (False, True), (False, True))
    for number, (storage, activation, bias, residual) in enumerate(kinds):
        tokens = TOKENS[number % len(TOKENS)]
        weight = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < (0.4 if number % 5 else 0.0))
        x, b, r = torch.randn(*tokens, IN), torch.randn(OUT), torch.randn(*tokens, OUT)
        y = call(
            "sparse_linear", x, [weight], "dense", OUT, IN,
            b if bias else None, activation, r if residual else None,
        )  # fmt: skip
        inputs = {"x": x, **packed(weight, storage), "bias": b, "residual": r}
        operator = linear(storage, activation, bias, residual)
        attributes = {"in_features": IN, "out_features": OUT}
        attributes |= {"storage": storage, "activation": activation}
        yield Case(operator, of(operator, inputs), attributes, (y,))
