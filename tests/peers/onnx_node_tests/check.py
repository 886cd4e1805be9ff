"""One case through import, passes, TVM and run, compared with what the package expects."""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from sparsify.compiler import Builder, compile_programs
from sparsify.config import CompileConfig
from sparsify.frontend.normalise import normalise
from sparsify.frontend.onnx.capture import export
from sparsify.frontend.onnx.file import read_onnx
from sparsify.frontend.onnx.model import OnnxModel
from sparsify.frontend.onnx.module import OnnxModule
from sparsify.frontend.onnx.registry import Unsupported, find, standard
from sparsify.frontend.onnx.tensors import NARROW, onnx_type, to_torch
from tests.peers.onnx_node_tests.cases import Case
from tests.peers.onnx_node_tests.outcome import Outcome, Verdict, first_line

# Half of what compiling a tiny model costs is PyTorch looking through all namespaces of operators,
# again for each model; nobody registers operators between cases.
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(
    torch._export.utils._collect_all_valid_cia_ops_for_namespace
)

_LACKED = [
    onnx.helper.tensor_dtype_to_np_dtype(code) for code in (*NARROW, onnx.TensorProto.FLOAT4E2M1)
]
_SHAPES = ("Shape", "Size")
"""What these compute follows from an input's shape, which is known, and not from its elements."""


def check(case: Case, eager: bool = False) -> Outcome:
    """The verdict on a case; inputs that shapes follow from are made constants first.

    Args:
        eager: compile nothing, and let PyTorch run what was imported.
    """
    passed: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"{case.name}.onnx"
        path.write_bytes(case.model.SerializeToString())
        for inputs, expected in case.data_sets:
            outcome = _check(case, path, inputs, expected, eager)
            if not outcome.passed:
                return outcome
            passed.append(outcome)
    return max(passed, key=lambda outcome: outcome.verdict == "fallback")


def _check(case: Case, path: Path, inputs: list[Any], expected: list[Any], eager: bool) -> Outcome:
    stage: Verdict = "import"
    fixed: tuple[str, ...] = ()
    given = dict(zip((i.name for i in case.model.graph.input), inputs, strict=True))
    try:
        fixed = shaping_inputs(read_onnx(path))
        model = read_onnx(path, constants={name: _tensor(given[name]) for name in fixed})
        tensors = {i.name: _tensor(given[i.name]) for i in model.inputs}
        if not model.inputs:
            results = OnnxModule(model)()
            stage = "wrong"
            case.check(_arrays(results, model, expected), expected)
            return Outcome("folded", "", fixed)
        exported = export(model, tensors, dynamic=False)
        arguments = tuple(tensors.values())
        if eager or not _computes(exported):
            results = exported.module()(*arguments)
            stage = "wrong"
            case.check(_arrays(results, model, expected), expected)
            return Outcome("folded", "", fixed)
        stage = "compile"
        compiled = compile_programs(
            _builder(),
            {"forward": exported},
            functools.partial(normalise, exported),
            {"forward": ()},
        )
        stage = "run"
        results = compiled(*arguments)
        stage = "wrong"
        case.check(_arrays(results, model, expected), expected)
    except Exception as error:
        refused = ("cannot be imported", "is not supported")
        if isinstance(error, Unsupported) or any(words in str(error) for words in refused):
            stage = "unsupported"
        return Outcome(stage, _cause(error), fixed)
    left = [d for d in compiled.report if d.verdict == "unsupported"]
    if left:
        return Outcome("fallback", "; ".join(sorted({d.reason for d in left})), fixed)
    return Outcome("whole", "", fixed)


@functools.cache
def _builder() -> Builder:
    return Builder.of(CompileConfig(cache=False, num_threads=1))


def shaping_inputs(model: OnnxModel) -> tuple[str, ...]:
    """The inputs that a handler must know while it is traced, because shapes follow from them.

    Real files compute these from constants and shapes; the node tests give them as inputs.
    """
    nodes = list(_nodes(model.graph))
    sources = {name: node for node in nodes for name in node.output}
    needed: list[str] = []
    for node in nodes:
        domain = standard(node.domain)
        handler = find(domain, node.op_type, model.versions.get(domain, 0))
        if handler is not None:
            parameters = handler.parameters(len(node.input))
            needed += [n for n, p in zip(node.input, parameters, strict=True) if p in handler.host]
    seen: set[str] = set()
    while needed:
        name = needed.pop()
        if name in sources and name not in seen and sources[name].op_type not in _SHAPES:
            needed += sources[name].input
            needed += [o.name for a in sources[name].attribute for o in a.g.output]
        seen.add(name)
    return tuple(i.name for i in model.inputs if i.name in seen)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def _arrays(results: Any, model: OnnxModel, expected: list[Any]) -> list[np.ndarray]:
    """Results as arrays; those of types that PyTorch lacks, in which they are wider, as them."""
    arrays = [array_of(results[name]) for name in model.outputs]
    pairs = zip(arrays, expected, strict=True)
    return [a.astype(e.dtype) if getattr(e, "dtype", None) in _LACKED else a for a, e in pairs]


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of the type that the onnx package has for it."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx_type(tensor.dtype))
    if tensor.dtype == torch.bfloat16 or (tensor.is_floating_point() and tensor.itemsize == 1):
        bits = torch.uint16 if tensor.itemsize == 2 else torch.uint8
        return tensor.detach().contiguous().view(bits).numpy().view(dtype)
    return tensor.detach().numpy()


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, np.ndarray) or value.dtype == object:
        raise Unsupported(f"an input that is {type(value).__name__}, not a tensor of numbers")
    return to_torch(numpy_helper.from_array(value))


def _computes(exported: torch.export.ExportedProgram) -> bool:
    return any(node.op == "call_function" for node in exported.graph.nodes)


def _cause(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and "cannot be imported" in lines[0]:
        lines = _unique(line.strip() for line in lines[1:])
    text = re.sub(r"^\S+\.onnx: ", "", lines[0]) if lines else ""
    return first_line(f"{type(error).__name__}: {text}" if text == "" else text)


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


__all__ = ["check"]
