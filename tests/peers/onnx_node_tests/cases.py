"""The node tests of the onnx package, and its own comparison of results."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass(frozen=True)
class Case:
    """One model with inputs and the outputs that they must give.

    Attributes:
        data_sets: ``(inputs, outputs)`` in the order of the graph's; a value is an array, or a list
            or None where the graph wants a sequence or an optional value.
    """

    name: str
    model: onnx.ModelProto
    data_sets: tuple[tuple[list[Any], list[Any]], ...]
    rtol: float
    atol: float

    @property
    def operators(self) -> tuple[str, ...]:
        """``domain:type`` of the graph's nodes, each once; the empty domain is left out."""
        nodes = self.model.graph.node
        return tuple(dict.fromkeys(f"{n.domain}:{n.op_type}".lstrip(":") for n in nodes))

    def check(self, outputs: Sequence[Any], expected: Sequence[Any]) -> None:
        """Raises AssertionError when results differ by more than the package itself allows."""
        from onnx.backend.test.runner import Runner

        Runner.assert_similar_outputs(expected, outputs, self.rtol, self.atol)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every node test of the installed onnx package, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own examples overflow and divide by zero
        loaded = load_model_tests(kind="node")
    cases = [
        Case(
            test.name,
            test.model,
            tuple((list(map(_value, i)), list(map(_value, o))) for i, o in test.data_sets),
            test.rtol,
            test.atol,
        )
        for test in loaded
    ]
    return tuple(sorted(cases, key=lambda case: case.name))


def matching(text: str) -> tuple[Case, ...]:
    """The cases whose name, or one of whose operators, is or contains this text."""
    return tuple(
        case for case in all_cases() if text in case.name or text.lower() in _lower(case.operators)
    )


def sample(cases: Iterable[Case], count: int) -> tuple[Case, ...]:
    """The same few cases each time, without regard to their order or neighbours."""
    ranked = sorted(cases, key=lambda case: hashlib.sha256(case.name.encode()).digest())
    return tuple(ranked[:count])


def _lower(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value
