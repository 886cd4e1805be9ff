"""One case through import, passes, TVM and run, compared with what the package expects."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from sparsify.compiler import Builder, compile_programs
from sparsify.config import CompileConfig
from sparsify.frontend.normalise import normalise
from sparsify.frontend.onnx.capture import export
from sparsify.frontend.onnx.file import prepare
from sparsify.frontend.onnx.model import OnnxModel
from sparsify.frontend.onnx.node import standard
from sparsify.frontend.onnx.registry import Unsupported, find
from sparsify.frontend.onnx.tensors import onnx_type, to_torch
from tests.peers.onnx_node_tests.cases import Case
from tests.peers.onnx_node_tests.outcome import Outcome, Verdict, first_line

# Half of what compiling a tiny model costs is PyTorch looking through all namespaces of operators,
# again for each model; nobody registers operators between cases.
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(
    torch._export.utils._collect_all_valid_cia_ops_for_namespace
)


def check(case: Case) -> Outcome:
    """The verdict on a case; inputs that shapes follow from are made constants first."""
    fixed = shaping_inputs(case.model)
    passed: list[Outcome] = []
    for inputs, expected in case.data_sets:
        outcome = _check(case, inputs, expected, fixed)
        if not outcome.passed:
            return outcome
        passed.append(outcome)
    return max(passed, key=lambda outcome: outcome.verdict == "fallback")


def _check(case: Case, inputs: list[Any], expected: list[Any], fixed: tuple[str, ...]) -> Outcome:
    stage: Verdict = "import"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = dict(zip((i.name for i in case.model.graph.input), inputs, strict=True))
            model = prepare(with_constants(case.model, {n: given[n] for n in fixed}), case.name)
            tensors = {i.name: _tensor(given[i.name]) for i in model.inputs}
            exported = export(model, tensors)
            arguments = exported.example_inputs[1]
            if not _computes(exported):
                results = exported.module()(**arguments)
                case.check([array_of(results[name]) for name in model.outputs], expected)
                return Outcome("folded", "", fixed)
            stage = "compile"
            compiled = compile_programs(
                _builder(),
                {"forward": exported},
                functools.partial(normalise, exported),
                {"forward": ()},
            )
            stage = "run"
            results = compiled(**arguments)
            stage = "wrong"
            case.check([array_of(results[name]) for name in model.outputs], expected)
    except Exception as error:
        if isinstance(error, Unsupported) or _is_refusal(error):
            stage = "unsupported"
        return Outcome(stage, _cause(error), fixed)
    left = [d for d in compiled.report if d.verdict == "unsupported"]
    if left:
        return Outcome("fallback", "; ".join(sorted({d.reason for d in left})), fixed)
    return Outcome("whole", "", fixed)


@functools.cache
def _builder() -> Builder:
    return Builder.of(CompileConfig(cache=False, num_threads=1))


def shaping_inputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """The inputs that a handler must know while it is traced, because shapes follow from them.

    Real files compute these from constants and shapes; the node tests give them as inputs.
    """
    versions = {standard(entry.domain): entry.version for entry in model.opset_import}
    sources = {name: node for node in model.graph.node for name in node.output}
    needed: list[str] = []
    for node in model.graph.node:
        domain = standard(node.domain)
        handler = find(domain, node.op_type, versions.get(domain, 0))
        if handler is None:
            continue
        parameters = handler.parameters(len(node.input))
        needed += [n for n, p in zip(node.input, parameters, strict=True) if p in handler.host]
    seen: set[str] = set()
    while needed:
        name = needed.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in sources and sources[name].op_type not in ("Shape", "Size"):
            needed += sources[name].input
    return tuple(i.name for i in model.graph.input if i.name in seen)


def with_constants(model: onnx.ModelProto, values: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with some of its inputs as initializers."""
    if not values:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for name, value in values.items():
        changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    inputs = [i for i in changed.graph.input if i.name not in values]
    del changed.graph.input[:]
    changed.graph.input.extend(inputs)
    return changed


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of the type that the onnx package has for it."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx_type(tensor.dtype))
    if tensor.dtype in (torch.bfloat16,) or tensor.dtype.itemsize == 1 and dtype.kind == "V":
        bits = torch.uint16 if tensor.dtype.itemsize == 2 else torch.uint8
        return tensor.detach().contiguous().view(bits).numpy().view(dtype)
    return tensor.detach().numpy()


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, np.ndarray) or value.dtype == object:
        raise Unsupported(f"an input that is {type(value).__name__}, not a tensor of numbers")
    return to_torch(numpy_helper.from_array(value))


def _computes(exported: torch.export.ExportedProgram) -> bool:
    return any(node.op == "call_function" for node in exported.graph.nodes)


def _is_refusal(error: Exception) -> bool:
    return "nodes cannot be imported" in str(error) and " fails on " not in str(error)


def _cause(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and "cannot be imported" in lines[0]:
        lines = _unique(line.strip() for line in lines[1:])
    text = lines[0] if lines else ""
    return first_line(f"{type(error).__name__}: {text}" if text == "" else text)


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


__all__ = ["check"]
