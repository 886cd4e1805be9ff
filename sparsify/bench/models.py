"""Peers that run a whole PyTorch model: torch eager, ONNX Runtime and OpenVINO.

Both foreign runtimes read one ONNX file: the user's own where the model is one, else an export at
the very shapes they are run with and at opset 23, whose attention operator they fuse. Of the ways
tried (fixed and dynamic shapes, opset 18 and 23, ``openvino.convert_model``) this is the fastest
for each, or within the noise of it.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.peer import Peer, flat_tensors, split_inputs
from sparsify.bench.runtimes import onnxruntime_peer, openvino_peer

OPSET = 23


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file and its inputs by name; the folder for what is made of it lives as long."""

    path: Path
    feeds: Mapping[str, torch.Tensor]
    exported: torch.export.ExportedProgram
    folder: tempfile.TemporaryDirectory[str]

    @classmethod
    def export(cls, model: torch.nn.Module, inputs: Any) -> OnnxModel:
        """Exports at the shapes of ``inputs`` (a tuple of arguments, or a mapping by name).

        Raises:
            ValueError: when PyTorch cannot export the model to ONNX, with the cause.
        """
        args, kwargs = split_inputs(inputs)
        folder = tempfile.TemporaryDirectory(prefix="sparsify-onnx-")
        path = Path(folder.name, "model.onnx")
        with _quiet():
            try:
                exported = torch.export.export(model, args, kwargs, strict=False)
                program = torch.onnx.export(
                    exported, dynamo=True, opset_version=OPSET, verbose=False
                )
                assert program is not None
                program.save(path, external_data=False)
            except Exception as error:
                cause = str(error).strip().splitlines()
                raise ValueError(
                    f"{type(model).__name__} cannot be exported to ONNX for the peers: "
                    f"{cause[0] if cause else type(error).__name__}"
                ) from error
        names = [value.name or "" for value in program.model.graph.inputs]
        tensors = flat_tensors((args, kwargs))
        if len(names) != len(tensors):
            raise ValueError(f"the ONNX file has inputs {names} for {len(tensors)} tensors given")
        return cls(path, dict(zip(names, tensors, strict=True)), exported, folder)

    @classmethod
    def of(
        cls, path: Path, feeds: Mapping[str, torch.Tensor], exported: torch.export.ExportedProgram
    ) -> OnnxModel:
        """The user's own file, as it is, with the program that it was imported as."""
        return cls(path, feeds, exported, tempfile.TemporaryDirectory(prefix="sparsify-onnx-"))

    def pt2(self) -> Path:
        """The same program as a ``.pt2`` file, written when first asked for."""
        path = Path(self.folder.name, "model.pt2")
        if not path.exists():
            with _quiet():
                torch.export.save(self.exported, path)
        return path


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """``torch.export.load``, for programs that return Hugging Face outputs too.

    Those need their class, which is known only once transformers is imported.
    """
    with _quiet():
        try:
            return torch.export.load(path)
        except Exception:
            try:
                import transformers.modeling_outputs  # noqa: F401
            except ImportError:
                pass
            else:
                return torch.export.load(path)
            raise


def torch_peer(model: torch.nn.Module, inputs: Any, threads: int) -> Peer:
    """The module itself, called under ``no_grad``."""
    args, kwargs = split_inputs(inputs)

    def call() -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    settings = {"num_threads": threads}
    return Peer("torch", torch.__version__, call, lambda: flat_tensors(call()), settings)


def compiled_peer(
    compiled: Callable[..., Any], inputs: Any, threads: int, file_bytes: int | None = None
) -> Peer:
    """A model compiled by sparsify, called as a user calls it."""
    args, kwargs = split_inputs(inputs)

    def call() -> Any:
        return compiled(*args, **kwargs)

    settings = {"num_threads": threads}
    return Peer("sparsify", "", call, lambda: flat_tensors(call()), settings, file_bytes)


_ON_ONNX = {"onnxruntime": onnxruntime_peer, "openvino": openvino_peer}
MODEL_PEERS = ("torch", *_ON_ONNX)


def model_peers(
    model: torch.nn.Module,
    inputs: Any,
    threads: int,
    names: tuple[str, ...] = MODEL_PEERS,
    onnx: OnnxModel | None = None,
) -> dict[str, Peer]:
    """Peers by name, over one ONNX export; pass ``onnx`` to share it between thread counts.

    Raises:
        ValueError: for an unknown name, a runtime that is not installed, or a failed export.
    """
    unknown = [name for name in names if name not in MODEL_PEERS]
    if unknown:
        raise ValueError(f"unknown peers {unknown}; known: {', '.join(MODEL_PEERS)}")
    peers = {}
    for name in names:
        if name == "torch":
            peers[name] = torch_peer(model, inputs, threads)
            continue
        onnx = onnx or OnnxModel.export(model, inputs)
        try:
            peers[name] = _ON_ONNX[name](onnx.path, onnx.feeds, threads)
        except ImportError as error:
            raise ValueError(f"peer {name!r} is not installed: pip install {name}") from error
    return peers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what no user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
