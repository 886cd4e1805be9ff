"""Programs as bytes without their weights, in torch.export's JSON, read without running code.

torch's own reader evaluates expressions and resolves functions by name. A file may come from
anywhere, so what it names is checked against what our programs hold before torch sees it.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._export.serde.serialize import SerializedArtifact, deserialize, serialize
from torch.export import ExportedProgram
from torch.utils import _pytree

import sparsify.ops  # noqa: F401  (its operators are in the graphs)
from sparsify.artefact.container import ArtefactError
from sparsify.program import Program, rebuild

_OPERATORS = re.compile(
    r"torch\.ops\.(?:aten\.(?!from_file\b)|sparsify\.)\w+\.\w+"
    r"|_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(?:ceil|floor|trunc|sqrt)"
    r"|torch\.sym_\w+"
)
_EXPRESSIONS = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword)
_FUNCTIONS = frozenset(
    {
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min"),
        *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan"),
        *("GreaterThan", "And", "Or", "Not", "FloorDiv", "CleanDiv", "CeilDiv", "Mod"),
        *("PythonMod", "ModularIndexing", "Where", "CeilToInt", "FloorToInt", "LShift", "RShift"),
        *("PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToInt", "TruncToFloat"),
        *("RoundToInt", "ToFloat", "Identity", "true", "false"),
    }
)
_PLAIN_PACKAGES = frozenset({"transformers"})
"""Packages whose output types may be imported for a file that is not trusted."""


class SavedProgram:
    """A program without its weights, held as a graph or as bytes, converted when asked.

    Its name is not part of the bytes.
    """

    def __init__(
        self, name: str, program: Program | None = None, data: bytes | None = None
    ) -> None:
        self.name, self._program, self._data = name, program, data

    def program(self, weights: Mapping[str, torch.Tensor]) -> Program:
        """The program over these weights."""
        if self._program is None:
            assert self._data is not None
            self._program = Program(self.name, _read(self._data))
        return with_weights(self._program, weights)

    def data(self) -> bytes:
        """Its bytes.

        Raises:
            ArtefactError: the model's inputs or outputs have a type that cannot be named in a
                file.
        """
        if self._data is None:
            assert self._program is not None
            self._data = _written(self._program.exported)
        return self._data

    def weight_names(self) -> tuple[str, ...]:
        if self._program is not None:
            return tuple(self._program.weight_names.values())
        specs = json.loads(self.data())["graph_module"]["signature"]["input_specs"]
        return tuple(s["parameter"]["parameter_name"] for s in specs if "parameter" in s)

    @classmethod
    def of(cls, program: Program) -> SavedProgram:
        """Lets go of the program's weights."""
        return cls(program.name, with_weights(program, {}))


def checked(data: bytes, name: str, *, trusted: bool) -> SavedProgram:
    """A program of this name, read from a file.

    The types of inputs and outputs are imported by name: any installed module's for a trusted
    file, else those of transformers and of modules that are imported already.

    Raises:
        ArtefactError: names something that no program of ours holds, or a type that is missing.
    """
    try:
        record = json.loads(data)
        for value in _all(record, "target"):
            if not _OPERATORS.fullmatch(value):
                raise ArtefactError(f"the graph calls {value!r}, which is no operator of a model")
        for value in _all(record, "expr_str"):
            _check_expression(value)
        for key in ("in_spec", "out_spec"):
            for spec in _all(record, key):
                _import_types(json.loads(spec), trusted)
    except (ValueError, TypeError) as cause:
        raise ArtefactError(f"the program cannot be read: {cause}") from cause
    record["guards_code"] = []
    return SavedProgram(name, data=json.dumps(record).encode())


def with_weights(program: Program, weights: Mapping[str, torch.Tensor]) -> Program:
    """The program over other weights of the same shapes; missing ones are empty on device meta."""
    old = program.exported
    state: dict[str, torch.Tensor] = {
        name: _parameter(weights[name] if name in weights else torch.empty(0, device="meta"))
        for name in program.weight_names.values()
    }
    exported = rebuild(old, old.graph, old.graph_signature, state)
    exported._example_inputs = None
    return Program(program.name, exported)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor, requires_grad=False)


def _written(exported: ExportedProgram) -> bytes:
    try:
        artifact = serialize(
            exported,
            serialize_state_dict=False,
            serialize_constants=False,
            serialize_example_inputs=False,
        )
    except Exception as cause:
        raise ArtefactError(
            f"the program cannot be written ({cause}); if a type of the model's inputs or outputs "
            "is the cause, register it with a serialized_type_name "
            "(torch.export.register_dataclass, torch.utils._pytree)"
        ) from cause
    record = json.loads(artifact.exported_program)
    # Traces name the files of whoever compiled, and guards are code: our own checks replace them.
    for node in record["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    record["graph_module"]["module_call_graph"] = record["graph_module"]["module_call_graph"][:1]
    record["guards_code"] = []
    return json.dumps(record).encode()


def _read(data: bytes) -> ExportedProgram:
    specs = json.loads(data)["graph_module"]["signature"]["input_specs"]
    names = [s["parameter"]["parameter_name"] for s in specs if "parameter" in s]
    empty: dict[str, Any] = {n: _parameter(torch.empty(0, device="meta")) for n in names}
    try:
        return deserialize(SerializedArtifact(data, empty, {}, b""))  # type: ignore[arg-type]
    except Exception as cause:
        raise ArtefactError(
            f"torch {torch.__version__} cannot read the program ({cause}); load it with the "
            "version of torch that saved it"
        ) from cause


def _all(record: Any, key: str) -> Iterator[str]:
    """Every text under ``key``, at any depth."""
    if isinstance(record, dict):
        for name, value in record.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _all(value, key)
    elif isinstance(record, list):
        for value in record:
            yield from _all(value, key)


def _check_expression(text: str) -> None:
    for node in ast.walk(ast.parse(text, mode="eval")):
        called = node.func if isinstance(node, ast.Call) else None
        named = isinstance(node, ast.Name) and node.id not in _FUNCTIONS
        if not isinstance(node, _EXPRESSIONS) or named:
            raise ArtefactError(f"{text!r} is no size")
        if called is not None and not isinstance(called, ast.Name):
            raise ArtefactError(f"{text!r} is no size")


def _import_types(record: Any, trusted: bool) -> None:
    for name in _all(record, "type"):
        if name in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            continue
        module = name.rpartition(".")[0]
        package = module.partition(".")[0]
        if not trusted and package not in _PLAIN_PACKAGES and module not in sys.modules:
            raise ArtefactError(
                f"the model takes or returns a {name}; import {package or name} before loading, "
                "or load with trusted=True"
            )
        while module and name not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            try:
                importlib.import_module(module)
            except ImportError as cause:
                if not isinstance(cause, ModuleNotFoundError) or cause.name == package:
                    raise ArtefactError(
                        f"the model takes or returns a {name}, and {package} cannot be imported "
                        f"({cause}); install it"
                    ) from cause
            module = module.rpartition(".")[0]
        if name not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
            raise ArtefactError(
                f"the model takes or returns a {name}, which importing {package} does not "
                "register with torch's pytree; register it before loading"
            )
