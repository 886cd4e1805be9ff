"""Exported files in ONNX Runtime at full speed: the library of our operators, and sessions with it.

    from sparsify import onnxruntime
    session = onnxruntime.session("model.onnx", threads=2)
    session.run(None, {"input_ids": ids, "attention_mask": mask})

A file of `CompiledModel.export_onnx` runs in any ONNX Runtime, by the function bodies that it
holds. The library puts kernels in their place. It is compiled once for a kind of CPU, serves every
file, and needs nothing but libc: take it to machines that have neither Python nor sparsify.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.artefact.trust import cache_directory
from sparsify.sources import sources_digest

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

    from sparsify.codegen.target import Target


def build_library(path: str | os.PathLike[str], *, target: str = "native") -> Path:
    """Compiles the custom-operator library for ONNX Runtime 1.17 and later; takes half a minute.

    Register it by ``SessionOptions.register_custom_ops_library`` or its like in other languages.
    Older versions load it and run the function bodies instead.

    Args:
        path: the shared library to write; it is complete or absent.
        target: ``native`` or another x86 target of ``sparsify targets``.

    Returns:
        The path.

    Raises:
        UnknownTarget: no such target, or none that libraries are built for.
        FileNotFoundError: no C compiler.
        RuntimeError: compiling failed, with the compiler's message.
    """
    from sparsify.codegen.emit import ort_ops

    written = Path(path)
    ort_ops.build(written, _parsed(target))
    return written


def library(target: str = "native") -> Path:
    """The library for a target, built when first asked for and kept in the cache directory."""
    parsed = _parsed(target)
    path = cache_directory() / "onnxruntime" / f"libsparsify_ort-{_key(parsed)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        build_library(path, target=target)
    return path


def session(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    options: SessionOptions | None = None,
    target: str = "native",
    **arguments: Any,
) -> InferenceSession:
    """An ``onnxruntime.InferenceSession`` whose nodes of ours run on our kernels.

    Args:
        path: an ONNX file.
        threads: of one run; by default ONNX Runtime's choice, one for each physical core.
        options: to start from; the library is added to them.
        target: what the library is compiled for.
        arguments: for ``InferenceSession``; providers are the CPU's unless given.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
        ValueError: fewer threads than one.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "sessions need the package onnxruntime, 1.17 or later; install onnxruntime"
        ) from missing
    if threads is not None and threads < 1:
        raise ValueError(f"session: threads={threads} must be at least 1")
    options = onnxruntime.SessionOptions() if options is None else options
    if threads is not None:
        options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library(target)))
    arguments.setdefault("providers", ["CPUExecutionProvider"])
    return onnxruntime.InferenceSession(os.fspath(path), options, **arguments)


def _parsed(target: str) -> Target:
    from sparsify.codegen.target import Target, UnknownTarget

    parsed = Target.parse(target)
    if not dict(parsed.spec)["mtriple"].startswith("x86_64"):
        raise UnknownTarget(
            f"target {target!r}: the library for ONNX Runtime is built by the system's compiler, "
            "for x86-64 alone; name native, x86-avx2 or x86-avx512"
        )
    return parsed


def _key(target: Target) -> str:
    """What the library's code follows from: the target, our sources, TVM."""
    from importlib.metadata import version

    import sparsify.codegen
    import sparsify.layouts
    import sparsify.ops

    sources = sources_digest(sparsify.codegen, sparsify.layouts, sparsify.ops)
    parts = (repr(target), sources, version("apache-tvm"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
