"""``active_linear`` and ``gated_linear`` in ONNX.

``ActiveLinear{Csr,Bitmap,Dense}[Bias][activation][Add]`` computes what ``Linear...`` of the same
ending does, ``GatedLinear{Csr,Bitmap,Dense}[Bias]`` gives ``y = gate * (x @ W.T + bias)``. Bodies
multiply by zeros, too; a kernel may skip them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from sparsify.ops.linear import ACTIVATIONS
from sparsify.ops.onnx.linear import BIAS, WEIGHTS, Storage, X, Y, linear, sums, transposed
from sparsify.ops.onnx.schema import FLOAT, OnnxOperator, Port, camel, chain, lines

_GATE = Port("gate", FLOAT, "[..., out_features]")


def active_linear(storage: Storage, activation: str, bias: bool, residual: bool) -> OnnxOperator:
    """The operator of this kind."""
    plain = linear(storage, activation, bias, residual)
    return replace(
        plain,
        name=f"Active{plain.name}",
        family="active_linear",
        summary=f"{plain.summary} Of a token's features of x, a share `active` is nonzero.",
        attributes={**plain.attributes, "active": "float"},
    )


def gated_linear(storage: Storage, bias: bool) -> OnnxOperator:
    """The operator of this kind."""
    steps = [*sums(bias), lambda x, y: (f"{y} = Mul({x}, gate)",)]
    inner = f"(x @ W.T{' + bias' * bias})"
    return OnnxOperator(
        f"GatedLinear{camel(storage)}{'Bias' * bias}",
        "gated_linear",
        f"A linear layer on a {storage} weight, gated: y = gate * {inner}. Of a token's features "
        "of the gate, a share `active` is nonzero.",
        (X, *WEIGHTS[storage], *[BIAS] * bias, _GATE),
        (Y,),
        {
            "in_features": "int",
            "out_features": "int",
            "storage": "string",
            "active": "float",
        },
        lines(*transposed(storage), *chain("x", steps)),
    )


KINDS = (
    *(
        active_linear(storage, activation, bias, residual)
        for storage, bias, activation, residual in product(
            WEIGHTS, (False, True), ACTIVATIONS, (False, True)
        )
    ),
    *(gated_linear(storage, bias) for storage, bias in product(WEIGHTS, (False, True))),
)
