"""Operators that treat every token alike: normalisation, rotary embedding, gates.

Rows and lanes have kernels of their own, so nothing is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from sparsify.codegen.gates import gate_kernels
from sparsify.codegen.kernels.cpu.gate import GateKernel
from sparsify.codegen.kernels.cpu.gated import Gated
from sparsify.codegen.kernels.cpu.norm import Norm, RowNorm
from sparsify.codegen.kernels.cpu.rotary import Rotary
from sparsify.codegen.operators.arguments import arguments_of, flat, product, shape_of
from sparsify.codegen.operators.linear import convert_linear_and_gate, gated_kernel
from sparsify.codegen.registry import Kernel
from sparsify.gates import parse
from sparsify.layouts import Form

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


def convert_fused_norm(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, weight, bias = (lowering.tensor(a[name]) for name in ("x", "weight", "bias"))
    form, features = _form(a), _features(x, a)
    kernel = (Norm if form == "lanes" else RowNorm)(
        lowering.target.isa, features, a["kind"], a["epsilon"], weight is not None, bias is not None
    )
    return _call(lowering, kernel, form, features, [x], [weight, bias])


def convert_rotary(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, cos, sin = (lowering.tensor(a[name]) for name in ("x", "cos", "sin"))
    form, features = _form(a), _features(x, a)
    kernel = Rotary(lowering.target.isa, a["heads"], a["head_dim"], features, form)
    return _call(lowering, kernel, form, features, [x, cos, sin])


def convert_gate(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    x, parameters = lowering.tensor(a["x"]), [lowering.tensor(p) for p in a["parameters"]]
    form, features = _form(a), _features(x, a)
    kernel = GateKernel(lowering.target.isa, features, parse(a["rule"]), form)
    return _call(lowering, kernel, form, features, [x], parameters)


def refuse_gate(node: fx.Node) -> str | None:
    rule = parse(arguments_of(node)["rule"])
    return None if gate_kernels(rule) else f"gate {rule.spec} has no kernel, only its reference"


def convert_gated(node: fx.Node, lowering: Lowering) -> Any:
    a = arguments_of(node)
    both = gated_kernel(a["x"], lowering)
    if both is not None:
        return convert_linear_and_gate(a["x"], both, lowering)
    x = lowering.tensor(a["x"])
    form, features = _form(a), _features(x, a) // 2
    kernel = Gated(lowering.target.isa, features, a["activation"], form)
    return _call(lowering, kernel, form, features, [x])


def _form(a: dict[str, Any]) -> Form:
    return "lanes" if a["lanes"] else "rows"


def _features(x: Any, a: dict[str, Any]) -> int:
    return int(shape_of(x)[1 if a["lanes"] else -1])


def _call(
    lowering: Lowering,
    kernel: Kernel,
    form: Form,
    features: int,
    activations: list[Any],
    weights: Sequence[Any] = (),
) -> Any:
    """Calls a kernel on activations in its form; the result has so many features."""
    extents = shape_of(activations[0])
    if form == "lanes":
        shape = [extents[0], features, extents[2]]
        return lowering.call_kernel(kernel, [*activations, *weights], shape)
    rows = [flat(lowering, x) for x in activations]
    y = lowering.call_kernel(kernel, [*rows, *weights], [product(extents[:-1]), features])
    return lowering.reshape(y, [*extents[:-1], features])
