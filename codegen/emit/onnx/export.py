"""A portable program becomes an ONNX file that any ONNX Runtime runs.

Operators of ours are nodes of the domain ``sparsify`` with a function body of standard operators;
all else is what ``torch.onnx.export`` makes of ATen operators.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from sparsify.codegen.emit.onnx import files
from sparsify.codegen.emit.onnx.linears import store_weights
from sparsify.codegen.emit.onnx.metadata import describe
from sparsify.codegen.emit.onnx.names import name_dimensions, name_nodes, name_outputs, tidy
from sparsify.codegen.emit.onnx.state import functional
from sparsify.codegen.emit.onnx.translate import translations
from sparsify.codegen.emit.onnx.weights import StoredWeight
from sparsify.ops.onnx import DOMAIN, ONNX_OPERATORS, OPSET
from sparsify.program import Program
from sparsify.report import Report

if TYPE_CHECKING:
    from onnxscript import ir

_IR_VERSION = 8
"""The first with functions in a model, and what belongs to opset 18: old runtimes read it."""

_ANY_SIZE = 2**62


@dataclass(frozen=True)
class OnnxSummary:
    """What was written.

    Attributes:
        nbytes: of the file, or of both.
        nodes: number of nodes by operator, ours with their domain.
        weights: what each distinct weight of a linear or of experts was stored as, by site.
    """

    nbytes: int
    nodes: dict[str, int]
    weights: dict[str, StoredWeight]

    @property
    def weight_bytes(self) -> int:
        """Of the weights of linears in the file."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def dense_bytes(self) -> int:
        """Of the same weights as float32 matrices."""
        return sum(weight.dense_nbytes for weight in self.weights.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.nbytes,
            "nodes": self.nodes,
            "weights": {site: weight.to_dict() for site, weight in self.weights.items()},
        }

    def __str__(self) -> str:
        ours = sum(n for name, n in self.nodes.items() if name.startswith(f"{DOMAIN}."))
        forms = Counter(f"{w.storage} of {w.value_type}" for w in self.weights.values())
        stored = ", ".join(f"{count} {form}" for form, count in forms.most_common())
        text = f"{self.nbytes / 1e6:.1f} MB, {sum(self.nodes.values())} nodes, {ours} of them ours"
        if not self.weights:
            return text
        return (
            f"{text}; weights of linears: {stored}; "
            f"{self.weight_bytes / 1e6:.1f} MB for {self.dense_bytes / 1e6:.1f} MB of dense ones"
        )


def export(
    program: Program,
    report: Report,
    path: Path,
    *,
    standard: bool = False,
    inputs: Mapping[str, str] | None = None,
) -> OnnxSummary:
    """Writes a portable program as ONNX, opset 18.

    Args:
        report: the decisions that nodes show in their metadata.
        standard: write no operator of ours, and dense weights.
        inputs: what inputs are called in the file, where not like the program's arguments.

    Raises:
        ValueError: operators that cannot be exported, all by name.
        OSError: the place cannot be written.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    _require_onnx()
    files.check(path)
    model, weights = build(program, report, standard=standard, inputs=inputs or {})
    nbytes = files.write(model, path)
    nodes = Counter(f"{n.domain}.{n.op_type}".lstrip(".") for n in model.graph)
    return OnnxSummary(nbytes, dict(nodes), weights)


def build(
    program: Program, report: Report, *, standard: bool, inputs: Mapping[str, str]
) -> tuple[ir.Model, dict[str, StoredWeight]]:
    """The model that `export` writes, and what its weights were stored as."""
    from onnxscript import optimizer

    with _quiet():
        exported, states = functional(program)
        model = _translate(exported)
        stored = store_weights(model, dense=standard)
        sites = name_nodes(model)
        for value in model.graph.inputs:
            value.name = inputs.get(value.name, value.name)
        name_outputs(model, program.exported, states)
        name_dimensions(model)
        describe(sites, stored, report)
        if standard:
            # Constants of bodies fold, the transposition of weights among them, whatever its size.
            _add_functions(model)
            optimizer.optimize_ir(model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
        else:
            optimizer.optimize_ir(model, inline=False)
            _add_functions(model)
    tidy(model)
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "sparsify", version("sparsify-compiler")
    model.graph.name = program.name
    return model, {name: weight for found in stored.values() for name, weight in found.items()}


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"ONNX export needs the package {missing.name}; install sparsify-compiler[onnx]"
        ) from missing


def _translate(exported: ExportedProgram) -> ir.Model:
    from torch.onnx import errors

    try:
        made = torch.onnx.export(
            exported,
            dynamo=True,
            custom_translation_table=translations(),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    except errors.OnnxExporterError as error:
        missing = unsupported(exported)
        if not missing:
            raise ValueError(f"the program cannot be exported to ONNX: {_cause(error)}") from error
        raise ValueError(
            f"there is no ONNX, opset {OPSET}, for {', '.join(missing)}; replace them in the model"
        ) from error
    assert made is not None
    return made.model


def unsupported(exported: ExportedProgram) -> list[str]:
    """Operators that ``torch.onnx.export`` has no translation for, each with its first node."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    known = set(_decomp.get_onnx_implemented_overloads(registry)) | set(translations())
    table = _decomp.create_onnx_friendly_decomposition_table(known)
    found: dict[str, str] = {}
    for node in exported.run_decompositions(table).graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target not in known:
            found.setdefault(str(node.target), node.name)
    return [f"{target} (node {name})" for target, name in sorted(found.items())]


def _cause(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return str(causes[-1]).strip().partition("\n")[0]


def _add_functions(model: ir.Model) -> None:
    """The body of each operator of ours that the graph has, once."""
    from onnxscript import ir

    used = dict.fromkeys(node.op_type for node in model.graph if node.domain == DOMAIN)
    for name in used:
        function = ir.serde.deserialize_function(ONNX_OPERATORS[name].function())
        model.functions[function.identifier()] = function


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries print warnings about their own insides, which no user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
