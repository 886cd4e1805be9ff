"""Products with a constant matrix become the linear operator with canonical storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify import ops
from sparsify.contracts import GraphPass, PassContext
from sparsify.layouts import Csr, Dense, Layout
from sparsify.passes.graph import arguments, aten, operand, past_copies, same, shape_of
from sparsify.passes.sites import named_weight, pack, site_name
from sparsify.report import Decision
from sparsify.rewriter import Rewriter

_PRODUCTS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
)


@dataclass(frozen=True)
class SparseLinear(GraphPass):
    """A linear with a constant weight stores its nonzeros only.

    Before::

        linear(x, W, bias) | addmm(bias, x, W.T) | mm(x, W.T) | matmul(x, W.T)

    After::

        sparse_linear(x, [values, columns, offsets], "csr", out_features, in_features, bias)

    Weights denser than ``max_density`` keep the dense matrix, ``sparse_linear(x, [W], "dense")``.
    Linears that share a weight share its tensors. A dense original that nothing else reads (an
    embedding may) leaves the program.
    """

    max_density: float = 0.9

    name = "sparse_linear"
    tolerance = 1e-5

    def rewrite(self, rewriter: Rewriter, context: PassContext) -> Iterable[Decision]:
        packed: dict[tuple, tuple[Layout, list[fx.Node], int]] = {}
        for node in rewriter.nodes:
            if node.target not in _PRODUCTS:
                continue
            found = _product(rewriter, node)
            if isinstance(found, str):
                if found:
                    yield Decision(node.name, "linear", "skipped", found, self.name)
                continue
            yield self._store(rewriter, node, found, packed)

    def _store(self, rewriter: Rewriter, node: fx.Node, found: _Product, packed: dict) -> Decision:
        name, original = named_weight(rewriter, found.parameter)
        key = (original.data_ptr(), original.shape, original.stride(), found.transposed)
        weight = original.t() if found.transposed else original
        if key not in packed:
            nnz = int(torch.count_nonzero(weight))
            sparse = nnz <= self.max_density * weight.numel()
            layout: Layout = Csr() if sparse else Dense()
            if sparse or found.transposed:
                stored = pack(weight, name, layout)
                nodes = [rewriter.add_weight(n, t) for n, t in stored.items()]
            else:
                nodes = [found.parameter]
            packed[key] = (layout, nodes, nnz)
        layout, nodes, nnz = packed[key]
        rows, columns = weight.shape
        with rewriter.graph.inserting_before(node):
            call = rewriter.call(
                ops.sparse_linear.overload,
                (found.x, nodes, layout.spec, rows, columns, found.bias),
            )
        rewriter.replace(node, call)
        density = nnz / max(1, weight.numel())
        is_sparse = not layout.is_dense
        limit = f"{self.max_density:.0%} nonzero"
        return Decision(
            site_name(name),
            "linear",
            "sparse" if is_sparse else "dense",
            f"{percent(density)} nonzero, "
            + (f"at most {limit}: only nonzeros are kept" if is_sparse else f"more than {limit}"),
            self.name,
            shape=(rows, columns),
            density=density,
            layout=layout.spec,
            bytes_stored=sum(named_weight(rewriter, n)[1].nbytes for n in nodes),
            bytes_dense=weight.nbytes,
        )


@dataclass(frozen=True)
class _Product:
    x: fx.Node
    parameter: fx.Node
    bias: fx.Node | None
    transposed: bool
    """Whether the parameter is stored as ``[in_features, out_features]``."""


def percent(fraction: float) -> str:
    """``0.2 -> 20%``, with a decimal where the nearest percent would hide something."""
    hides = 0 < fraction < 0.01 or 0.99 < fraction < 1
    return f"{fraction:.1%}" if hides else f"{fraction:.0%}"


def _product(rewriter: Rewriter, node: fx.Node) -> _Product | str:
    """The parts of a product with a constant matrix, or why it is none ('' when it is plain)."""
    options = arguments(node)
    if node.target == aten.linear.default:
        x, matrix, bias = options["input"], options["weight"], options["bias"]
        by_rows = True
    elif node.target == aten.addmm.default:
        x, matrix, bias = options["mat1"], options["mat2"], options["self"]
        by_rows = False
        if (options["beta"], options["alpha"]) != (1, 1):
            return f"addmm scales its operands (beta={options['beta']}, alpha={options['alpha']})"
    else:
        x, matrix = node.args[:2]
        bias, by_rows = None, False
        if _constant(rewriter, x) is not None and _constant(rewriter, matrix) is None:
            return "the constant matrix is the left operand; only x @ W is supported"
    constant = _constant(rewriter, matrix)
    if constant is None:
        return ""
    parameter, turned = constant
    if len(shape_of(parameter)) != 2:
        return f"the weight has shape {shape_of(parameter)}, not a matrix"
    if _constant(rewriter, x) is not None:
        return "both operands are constants: fold them first"
    rows = shape_of(parameter)[0 if by_rows != turned else 1]
    if bias is not None and not (len(shape_of(bias)) == 1 and same(shape_of(bias)[0], rows)):
        return f"the bias has shape {shape_of(bias)}, not [{rows}]"
    dtypes = {value.meta["val"].dtype for value in (x, parameter, bias) if value is not None}
    if dtypes != {torch.float32}:
        return f"operands are {', '.join(sorted(map(str, dtypes)))}; the kernels compute in float32"
    return _Product(x, parameter, bias, transposed=by_rows == turned)


def _constant(rewriter: Rewriter, node: Any) -> tuple[fx.Node, bool] | None:
    """A weight behind copies and transpositions, and whether it is transposed."""
    turned = False
    for step in _to_source(node):
        if rewriter.weight_of(step) is not None:
            return step, turned
        turned = not turned
    return None


def _to_source(node: Any) -> Iterator[fx.Node]:
    node = past_copies(node)
    while isinstance(node, fx.Node):
        yield node
        if not _is_transposition(node):
            return
        node = past_copies(node.args[0])


def _is_transposition(node: fx.Node) -> bool:
    if node.target == aten.t.default:
        return len(shape_of(node)) == 2
    if node.target == aten.transpose.int:
        return len(shape_of(node)) == 2 and operand(node, 1) % 2 != operand(node, 2) % 2
    return node.target == aten.permute.default and [a % 2 for a in operand(node, 1)] == [1, 0]
