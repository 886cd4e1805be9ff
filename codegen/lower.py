"""Lowers specialised programs to Relax: our operators to our kernels, the rest by TVM's importer.

Several programs become functions of one module and share kernels. Weights are parameters, after
the inputs, so that one packed copy serves every entry and every thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
import tvm
from torch import fx
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod
from tvm import relax, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter
from tvm.sym import Analyzer

from sparsify.codegen import operators
from sparsify.codegen.operators.arguments import arguments_of
from sparsify.codegen.registry import Kernel
from sparsify.codegen.target import Target
from sparsify.effects import written_by
from sparsify.program import Program


class LoweringError(RuntimeError):
    """A node could not be lowered; says which, with its operands' shapes."""


def lower(entries: Mapping[str, Program], target: Target) -> tvm.IRModule:
    """One Relax module with a function for each entry: ``(inputs..., weights...) -> tuple``."""
    builder = relax.BlockBuilder()
    kernels: dict[str, Any] = {}
    for name, program in entries.items():
        Lowering(program, target, builder, kernels).emit(name)
    return builder.get()


class Lowering(ExportedProgramImporter):
    """Lowers one program into a shared module.

    The importer's converters serve ATen operators; symbols, inputs and our operators are ours.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        builder: relax.BlockBuilder,
        kernels: dict[str, Any],
    ) -> None:
        super().__init__()
        self.program = program
        self.target = target
        self.block_builder = builder
        self.kernels = kernels
        self.symbols: dict[str, tirx.Var] = {}
        self._analyzer = Analyzer()
        self.prepared_masks: dict[fx.Node, Any] = {}
        self.convert_map.update(operators.CONVERTERS)

    def emit(self, name: str) -> None:
        """Adds the program as the function ``name``."""
        nodes = list(self.program.graph.nodes)
        weights = self.program.weight_names
        placeholders = [n for n in nodes if n.op == "placeholder"]
        order = [n for n in placeholders if n.name not in weights]
        order += [n for n in placeholders if n.name in weights]
        for node in order:
            self.env[node] = relax.Var(node.name, self.type_of(node.meta["val"]))
        params = [self.env[node] for node in order]
        inputs = len(order) - len(weights)
        with self.block_builder.function(name, params, attrs={"num_input": inputs}):
            with self.block_builder.dataflow():
                for node in nodes:
                    if node.op == "call_function":
                        self.env[node] = self._convert(node)
                output = next(n for n in nodes if n.op == "output")
                results = relax.Tuple([self.env[value] for value in output.args[0]])
                returned = self.block_builder.emit_output(results)
            self.block_builder.emit_func_output(returned)
        self._check_writes(name)

    def _check_writes(self, name: str) -> None:
        """TVM drops what no result depends on, calls that store into an input among it."""
        writes = [node for node in self.program.graph.nodes if written_by(node)]
        if not writes:
            return
        function = self.block_builder.get()[name]
        kept = relax.analysis.remove_all_unused(function)
        alive = {binding.var for block in kept.body.blocks for binding in block.bindings}
        for node in writes:
            if self.env[node] not in alive:
                raise LoweringError(
                    f"node {node.name}: operator {node.target} changes "
                    f"{', '.join(n.name for n in written_by(node))}, but no result depends on it "
                    "after lowering; a reader's kernel must take the result of the write"
                )

    def _convert(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            return self.extent(value)
        name = node.target.__name__
        if name not in self.convert_map:
            raise LoweringError(f"node {node.name}: no lowering for operator {node.target}")
        convert = self.convert_map[name]
        try:
            with self._agreed(node):
                result = convert(node, self) if name in operators.CONVERTERS else convert(node)
        except Exception as error:
            shapes = [_describe(operand) for operand in node.all_input_nodes]
            raise LoweringError(
                f"node {node.name}: operator {node.target} on {', '.join(shapes)} "
                f"could not be lowered: {error}"
            ) from error
        return self._with_known_shape(result, value)

    @contextlib.contextmanager
    def _agreed(self, node: fx.Node) -> Iterator[None]:
        """Gives operands of an elementwise operator, or of cat, the result's sizes.

        The export knows (s - 1) // 16 + 1 and 2 * ((s - 1) // 32) + 2 to be one size, because it
        was traced so. TVM does not, and would lose the shape of their sum. That they are one is
        checked when the program runs.
        """
        before = {operand: self.env[operand] for operand in node.all_input_nodes}
        joined = None
        if node.target == torch.ops.aten.cat.default:
            joined = arguments_of(node)["dim"] % node.meta["val"].dim()
        if joined is not None or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            wanted = self.type_of(node.meta["val"]).shape.values
            for operand, value in before.items():
                if isinstance(operand.meta.get("val"), torch.Tensor):
                    self.env[operand] = self._sized(value, wanted, joined)
        try:
            yield
        finally:
            self.env.update(before)

    def _sized(self, value: Any, wanted: Sequence[Any], joined: int | None) -> Any:
        """A value with the wanted sizes where its own are other expressions, and not constant.

        That they are the same is checked by a cast. One of an expression to a symbol would bind the
        symbol to itself and send TVM into endless substitution, so there the wanted shape is cast
        to the value's, and the value takes it.
        """
        sizes = list(value.ty.shape.values)
        first = len(wanted) - len(sizes)
        changed = []
        for axis, (own, size) in enumerate(zip(sizes, wanted[first:], strict=True)):
            known = isinstance(own, tirx.IntImm) or self._analyzer.can_prove_equal(own, size)
            if axis + first != joined and not known:
                changed.append(axis)
        if not changed:
            return value
        shape = [wanted[first + i] if i in changed else own for i, own in enumerate(sizes)]
        if not any(isinstance(shape[axis], tvm.ir.Var) for axis in changed):
            return self.block_builder.match_cast(value, relax.TensorType(shape, value.ty.dtype))
        same = self.block_builder.emit(relax.ShapeExpr(shape))
        self.block_builder.match_cast(same, relax.ShapeType(sizes))
        return self.reshape(value, shape)

    def _with_known_shape(self, result: Any, value: Any) -> Any:
        """Where the importer lost a shape that the graph knows, states it.

        By a reshape, which costs nothing; a match_cast of ``min(s, 512)`` to ``s`` would bind ``s``
        to itself and send TVM into endless substitution.
        """
        if not isinstance(value, torch.Tensor) or not isinstance(result, relax.Expr):
            return result
        wanted, found = self.type_of(value), result.ty
        if not isinstance(found, relax.TensorType) or found.dtype != wanted.dtype:
            raise LoweringError(f"importer made {found}, the graph says {wanted}")
        if found.shape is not None and self._same(found.shape.values, wanted.shape.values):
            return result
        return self.reshape(result, wanted.shape.values)

    def _same(self, found: Sequence[Any], wanted: Sequence[Any]) -> bool:
        """Whether two shapes are one; (24 - s) + s is not yet 24, which kernels want to read."""
        return len(found) == len(wanted) and all(
            isinstance(f, tirx.IntImm) >= isinstance(w, tirx.IntImm)
            and self._analyzer.can_prove_equal(f, w)
            for f, w in zip(found, wanted, strict=True)
        )

    def type_of(self, value: torch.Tensor) -> relax.TensorType:
        dtype = self._convert_data_type(value.dtype)
        return relax.TensorType([self.extent(e) for e in value.shape], dtype)

    def extent(self, value: int | torch.SymInt) -> Any:
        """A PyTorch extent as a TIR expression over the program's symbols."""
        if isinstance(value, int):
            return tirx.IntImm("int64", value)
        return self._symbolic(value.node.expr)

    def _symbolic(self, expression: sympy.Expr) -> Any:
        if isinstance(expression, sympy.Integer):
            return tirx.IntImm("int64", int(expression))
        if isinstance(expression, sympy.Symbol):
            name = str(expression)
            return self.symbols.setdefault(name, tirx.Var(name, "int64"))
        combine = _OPERATIONS.get(type(expression))
        operands = expression.args
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            operands, combine = [expression.base] * int(expression.exp), _OPERATIONS[sympy.Mul]
        if combine is None:
            raise LoweringError(f"extent {expression}: no lowering for {type(expression).__name__}")
        total = self._symbolic(operands[0])
        for operand in operands[1:]:
            total = combine(total, self._symbolic(operand))
        return total

    def tensor(self, node: Any) -> Any:
        """The Relax value of an argument."""
        return self.env[node] if isinstance(node, fx.Node) else node

    def call_kernel(
        self,
        kernel: Kernel,
        tensors: Sequence[Any],
        shape: Sequence[Any],
        integers: Sequence[Any] = (),
        dtype: str = "float32",
    ) -> Any:
        """Calls a kernel that fills one tensor of ``shape``; see `call_for`."""
        return self.call_for(kernel, tensors, relax.TensorType(shape, dtype), integers)

    def call_for(
        self, kernel: Kernel, tensors: Sequence[Any], types: Any, integers: Sequence[Any] = ()
    ) -> Any:
        """Calls a kernel that fills a tensor of a type, or a tuple of tensors of several.

        The kernel may also change tensors that it is given, if they are inputs of the program:
        calls stay in the order of the graph, and inputs keep their memory.
        """
        if kernel.name not in self.kernels:
            self.kernels[kernel.name] = self.block_builder.add_func(kernel.build(), kernel.name)
        call = relax.call_tir(
            self.kernels[kernel.name],
            [*(t for t in tensors if t is not None), *integers],
            types,
        )
        return self.block_builder.emit(call)

    def reshape(self, value: Any, shape: Sequence[Any]) -> Any:
        return self.block_builder.emit(relax.op.reshape(value, tuple(shape)))


_OPERATIONS = {
    sympy.Add: lambda a, b: a + b,
    sympy.Mul: lambda a, b: a * b,
    Max: tirx.max,
    Min: tirx.min,
    FloorDiv: tirx.floordiv,
    CleanDiv: tirx.floordiv,
    Mod: tirx.floormod,
    PythonMod: tirx.floormod,
}


def _describe(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else value
    return f"{node.name} {shape}"
