"""Rewrites of programs, one pass a file; `PORTABLE` and `SPECIALISE` are the default pipelines."""

from sparsify.passes.pipeline import largest_error, run_pipeline
from sparsify.passes.registry import (
    PORTABLE,
    SPECIALISE,
    PassInfo,
    describe,
    parse_pipeline,
    pass_names,
    pipeline_text,
    without,
)

__all__ = [
    "PORTABLE",
    "SPECIALISE",
    "PassInfo",
    "describe",
    "largest_error",
    "parse_pipeline",
    "pass_names",
    "pipeline_text",
    "run_pipeline",
    "without",
]
