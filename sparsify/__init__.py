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
    from sparsify.analysis import analyze_activations
    from sparsify.artefact.container import ArtefactError
    from sparsify.calibration import Calibration
    from sparsify.compiled import CompiledModel
    from sparsify.compiler import compile
    from sparsify.config import CompileConfig
    from sparsify.generation import CompiledCausalLM, Sampling
    from sparsify.loader import load
    from sparsify.moefication import moefy
    from sparsify.passes.attention_mixture import AttentionMixture
    from sparsify.passes.double_sparsity import DoubleSparsity
    from sparsify.passes.flex_prefill import FlexPrefill
    from sparsify.passes.gating import (
        Cats,
        Chess,
        ExactZeros,
        RSparse,
        SparkTopK,
        Teal,
        TopK,
        Wina,
    )
    from sparsify.passes.minference import MInference
    from sparsify.passes.moefy import Moefy
    from sparsify.passes.pattern_attention import PatternAttention
    from sparsify.passes.pooled_blocks import PooledBlocks
    from sparsify.passes.quest import Quest
    from sparsify.passes.seer_attention import SeerAttention
    from sparsify.passes.streaming_window import StreamingWindow
    from sparsify.passes.tidal_decode import TidalDecode
    from sparsify.passes.vertical_slash import VerticalSlash
    from sparsify.pruning import RoundWeights, Unstructured, prune
    from sparsify.report import Decision, Report

__all__ = [
    "ArtefactError",
    "AttentionMixture",
    "Calibration",
    "Cats",
    "Chess",
    "CompileConfig",
    "CompiledCausalLM",
    "CompiledModel",
    "Decision",
    "DoubleSparsity",
    "ExactZeros",
    "FlexPrefill",
    "MInference",
    "Moefy",
    "PatternAttention",
    "PooledBlocks",
    "Quest",
    "RSparse",
    "Report",
    "RoundWeights",
    "Sampling",
    "SeerAttention",
    "SparkTopK",
    "StreamingWindow",
    "Teal",
    "TidalDecode",
    "TopK",
    "Unstructured",
    "VerticalSlash",
    "Wina",
    "analyze_activations",
    "compile",
    "load",
    "moefy",
    "prune",
]

# Imported when first used: torch and TVM take seconds.
_HOMES = {
    "ArtefactError": "sparsify.artefact.container",
    "AttentionMixture": "sparsify.passes.attention_mixture",
    "Calibration": "sparsify.calibration",
    "Cats": "sparsify.passes.gating",
    "Chess": "sparsify.passes.gating",
    "CompileConfig": "sparsify.config",
    "CompiledCausalLM": "sparsify.generation",
    "CompiledModel": "sparsify.compiled",
    "Decision": "sparsify.report",
    "DoubleSparsity": "sparsify.passes.double_sparsity",
    "ExactZeros": "sparsify.passes.gating",
    "FlexPrefill": "sparsify.passes.flex_prefill",
    "MInference": "sparsify.passes.minference",
    "Moefy": "sparsify.passes.moefy",
    "PatternAttention": "sparsify.passes.pattern_attention",
    "PooledBlocks": "sparsify.passes.pooled_blocks",
    "Quest": "sparsify.passes.quest",
    "RSparse": "sparsify.passes.gating",
    "Report": "sparsify.report",
    "RoundWeights": "sparsify.pruning",
    "Sampling": "sparsify.generation",
    "SparkTopK": "sparsify.passes.gating",
    "SeerAttention": "sparsify.passes.seer_attention",
    "StreamingWindow": "sparsify.passes.streaming_window",
    "Teal": "sparsify.passes.gating",
    "TidalDecode": "sparsify.passes.tidal_decode",
    "TopK": "sparsify.passes.gating",
    "Unstructured": "sparsify.pruning",
    "VerticalSlash": "sparsify.passes.vertical_slash",
    "Wina": "sparsify.passes.gating",
    "analyze_activations": "sparsify.analysis",
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
