"""A compiler that makes sparse neural networks run as fast as their zeros promise.

import sparsify

model = sparsify.prune(model, sparsify.Unstructured(0.9))
compiled = sparsify.compile(model, example_inputs)
compiled(*inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.artefact.container import ArtefactError
    from sparsify.compiled import CompiledModel
    from sparsify.compiler import compile
    from sparsify.config import CompileConfig
    from sparsify.generation import CompiledCausalLM, Sampling
    from sparsify.loader import load
    from sparsify.moefication import moefy
    from sparsify.passes.moefy import Moefy
    from sparsify.pruning import RoundWeights, Unstructured, prune
    from sparsify.report import Decision, Report

__all__ = [
    "ArtefactError",
    "CompileConfig",
    "CompiledCausalLM",
    "CompiledModel",
    "Decision",
    "Moefy",
    "Report",
    "RoundWeights",
    "Sampling",
    "Unstructured",
    "compile",
    "load",
    "moefy",
    "prune",
]

# Imported when first used: torch and TVM take seconds.
_HOMES = {
    "ArtefactError": "sparsify.artefact.container",
    "CompileConfig": "sparsify.config",
    "CompiledCausalLM": "sparsify.generation",
    "CompiledModel": "sparsify.compiled",
    "Decision": "sparsify.report",
    "Moefy": "sparsify.passes.moefy",
    "Report": "sparsify.report",
    "RoundWeights": "sparsify.pruning",
    "Sampling": "sparsify.generation",
    "Unstructured": "sparsify.pruning",
    "compile": "sparsify.compiler",
    "load": "sparsify.loader",
    "moefy": "sparsify.moefication",
    "prune": "sparsify.pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
