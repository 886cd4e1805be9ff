"""``experts`` in ONNX: ``Experts{Csr,Bitmap,Dense}[Gated][activation][Bias]``.

The matrices of all experts are stored below each other as one, in a form of ``Linear...``, the same
for both projections. The body is a loop over the experts: each gathers its tokens, multiplies, and
adds what it made to the result; an expert without tokens multiplies nothing. A slot whose expert is
none of them is not used: the body cannot raise, as the reference and the kernels do.
"""

from __future__ import annotations

from itertools import product

from sparsify.ops.linear import ACTIVATIONS
from sparsify.ops.onnx.activations import activate, suffix
from sparsify.ops.onnx.linear import WEIGHTS, Storage, named_matrix, named_ports
from sparsify.ops.onnx.schema import (
    FLOAT,
    OnnxOperator,
    Port,
    camel,
    extent,
    integer,
    lines,
)


def experts(storage: Storage, gated: bool, activation: str, bias: bool) -> OnnxOperator:
    """The operator of this kind."""
    rows = "2 * hidden" if gated else "hidden"
    biases = (
        Port("up_bias", FLOAT, f"[count, {rows}]", constant=True),
        Port("down_bias", FLOAT, "[count, out_features]", constant=True),
    )
    inner = f"{activation}(gate(x)) * up(x)" if gated else f"{activation}(up(x))"
    return OnnxOperator(
        f"Experts{camel(storage)}{'Gated' * gated}{suffix(activation)}{'Bias' * bias}",
        "experts",
        f"y = sum over a token's slots of weight * down({inner}) of the slot's expert"
        + ("; the gate's rows are the first half of up's." if gated else "."),
        (
            Port("x", FLOAT, "[..., in_features]"),
            Port("experts", ("int32",), "[tokens, slots], -1: the slot is not used"),
            Port("weights", FLOAT, "[tokens, slots]"),
            *named_ports(storage, "up", f"count * {rows}", "in_features"),
            *named_ports(storage, "down", "count * out_features", "hidden"),
            *(biases if bias else ()),
        ),
        (Port("y", FLOAT, "[..., out_features]"),),
        {
            "count": "int",
            "out_features": "int",
            "hidden": "int",
            "in_features": "int",
            "storage": "string",
            "activation": "string",
        },
        _body(storage, gated, activation, bias),
    )


def _body(storage: Storage, gated: bool, activation: str, bias: bool) -> str:
    start = "gate" if gated else "projected"
    result = start if activation == "none" else "open"
    steps = (
        "number = Cast <to: int = 6> (turn)",
        "hits = Equal(experts, number)",
        "places = NonZero(hits)",
        "tokens = Gather <axis: int = 0> (places, begin)",
        "rows = Gather <axis: int = 0> (every_row, tokens)",
        "first = Gather <axis: int = 0> (ups, turn)",
        "second = Gather <axis: int = 0> (downs, turn)",
        *(
            (
                "sums = MatMul(rows, first)",
                "first_bias = Gather <axis: int = 0> (up_bias, turn)",
                "projected = Add(sums, first_bias)",
            )
            if bias
            else ("projected = MatMul(rows, first)",)
        ),
        *(("gate, other = Split <axis: int = -1, num_outputs: int = 2> (projected)",) * gated),
        *(() if activation == "none" else activate(activation)(start, "open")),
        *((f"hidden_rows = Mul({result}, other)",) * gated),
        f"made = MatMul({'hidden_rows' if gated else result}, second)",
        *(
            (
                "second_bias = Gather <axis: int = 0> (down_bias, turn)",
                "whole = Add(made, second_bias)",
            )
            if bias
            else ("whole = Identity(made)",)
        ),
        "pairs = Transpose <perm: ints = [1, 0]> (places)",
        "factors = GatherND(weights, pairs)",
        "factor_column = Unsqueeze(factors, last)",
        "weighted = Mul(whole, factor_column)",
        "token_column = Unsqueeze(tokens, last)",
        'total_next = ScatterND <reduction: string = "add"> (total, token_column, weighted)',
        "more_next = Identity(more)",
    )
    loop = "\n".join(f"      {step}" for step in steps)
    return lines(
        integer("one", 1),
        integer("last", -1),
        integer("none", 0),
        "begin = Constant <value_int: int = 0> ()",
        *extent("experts_extent", "count"),
        *extent("out_extent", "out_features"),
        *extent("in_extent", "in_features"),
        "row_shape = Concat <axis: int = 0> (last, in_extent)",
        "every_row = Reshape(x, row_shape)",
        "token_count = Shape <start: int = 0, end: int = 1> (every_row)",
        *extent("hidden_extent", "hidden"),
        *extent("up_in_extent", "in_features"),
        *extent("down_in_extent", "hidden"),
        integer("parts", 2 if gated else 1),
        "expert_rows = Mul(parts, hidden_extent)",
        "up_out_extent = Mul(experts_extent, expert_rows)",
        "down_out_extent = Mul(experts_extent, out_extent)",
        *named_matrix(storage, "up"),
        *named_matrix(storage, "down"),
        "up_shape = Concat <axis: int = 0> (experts_extent, last, in_extent)",
        "up_matrices = Reshape(up_matrix, up_shape)",
        "ups = Transpose <perm: ints = [0, 2, 1]> (up_matrices)",
        "down_shape = Concat <axis: int = 0> (experts_extent, out_extent, last)",
        "down_matrices = Reshape(down_matrix, down_shape)",
        "downs = Transpose <perm: ints = [0, 2, 1]> (down_matrices)",
        "total_shape = Concat <axis: int = 0> (token_count, out_extent)",
        "empty = ConstantOfShape <value: tensor = float[1] {0.0}> (total_shape)",
        "trips = Constant <value_int: int = @count> ()",
        "always = Constant <value: tensor = bool[1] {1}> ()",
        "go = Squeeze(always)",
        "y_rows = Loop (trips, go, empty) <body = each "
        "(int64 turn, bool more, float[t, o] total) => (bool more_next, float[t, o] total_next) {\n"
        f"{loop}\n    }}>",
        "x_shape = Shape <start: int = 0, end: int = -1> (x)",
        "y_shape = Concat <axis: int = 0> (x_shape, out_extent)",
        "y = Reshape(y_rows, y_shape)",
    )


KINDS = tuple(
    experts(storage, gated, activation, bias)
    for storage, gated, activation, bias in product(
        WEIGHTS, (False, True), ACTIVATIONS, (False, True)
    )
)
