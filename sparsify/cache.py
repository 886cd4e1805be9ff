"""Compilations kept on disk, so that the second one of the same model takes no time.

Entries are files like `CompiledModel.save` writes, named by what they were made from. Several
processes may share the directory: an entry appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import fx
from torch.export import ExportedProgram

from sparsify.artefact.compilation import Compilation
from sparsify.artefact.container import ArtefactError
from sparsify.artefact.files import Contents, versions, write
from sparsify.artefact.trust import cache_directory
from sparsify.program import WeightStore
from sparsify.sources import sources_digest
from sparsify.specs import plugins_digest

MAX_BYTES = 4 << 30
"""Bytes that the entries may take together, unless SPARSIFY_CACHE_BYTES says otherwise."""
_SUFFIX = ".sparsify"
_STALE_SECONDS = 24 * 3600


def key_of(captured: Mapping[str, ExportedProgram], *options: str) -> str:
    """What identifies a compilation: captured programs, their weights, the options, our sources.

    Args:
        captured: entry programs by name, not decomposed, so that a hit skips decomposition.
        options: digests and names of all else that changes the result.
    """
    import sparsify.codegen
    import sparsify.passes

    parts = [text for item in captured.items() for text in _described(*item)]
    parts += [
        _weights_of(captured).digest(),
        *options,
        *(f"{name} {number}" for name, number in versions().items()),
        sources_digest(sparsify, sparsify.passes, sparsify.codegen),
        plugins_digest(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _described(name: str, exported: ExportedProgram) -> Iterator[str]:
    yield name
    yield str(exported.graph)
    yield from (_input_text(n) for n in exported.graph.nodes if n.op == "placeholder")
    yield str(exported.graph_signature)
    yield str(exported.call_spec)
    yield str(exported.range_constraints)


def _weights_of(captured: Mapping[str, ExportedProgram]) -> WeightStore:
    """The weights and constants of all programs; those that programs share once."""
    found: dict[str, torch.Tensor] = {}
    for entry, exported in captured.items():
        for name, tensor in {**exported.state_dict, **exported.constants}.items():
            if not hasattr(tensor, "untyped_storage"):
                continue
            known = found.setdefault(name, tensor)
            if (known.data_ptr(), known.shape) != (tensor.data_ptr(), tensor.shape):
                found[f"{entry}:{name}"] = tensor
    return WeightStore(found)


def _input_text(node: fx.Node) -> str:
    """An input with its sizes on the examples too: layouts are chosen for those."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    hints = [getattr(getattr(size, "node", None), "hint", size) for size in sizes]
    return f"{node.name}: {value} {hints}"


def find(key: str) -> Compilation | None:
    """The compilation of this key; None when there is none that can be used."""
    path = _path(key)
    try:
        contents = Contents.open(path, trusted=None)
        if not contents.trusted or contents.outdated():
            return None
        compilation = contents.compilation()
        os.utime(path)
    except (OSError, ArtefactError):
        return None
    return compilation


def keep(key: str, compilation: Compilation) -> str | None:
    """Stores a compilation and drops the entries used longest ago; why it could not, or None."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(compilation, path)
        _evict(path.parent, _limit())
    except (OSError, ValueError) as cause:
        return str(cause)
    return None


def _path(key: str) -> Path:
    return cache_directory() / "compiled" / f"{key}{_SUFFIX}"


def _limit() -> int:
    text = os.environ.get("SPARSIFY_CACHE_BYTES", str(MAX_BYTES))
    if not text.isdecimal():
        raise ValueError(f"SPARSIFY_CACHE_BYTES={text!r} is no number of bytes")
    return int(text)


def _evict(folder: Path, limit: int) -> None:
    for path in folder.glob(f".*{_SUFFIX}.*"):  # left by processes that were killed
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)
    entries: list[tuple[float, int, Path]] = []
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        entries.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries)[:-1]:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
