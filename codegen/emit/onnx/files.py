"""Writes an ONNX model: complete or not at all, in one file or, over 2 GB, with a second one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxscript import ir

_LARGEST = 1_900_000_000
"""Bytes of weights in one file: a protobuf message may have 2 GiB."""

_SMALLEST_EXTERNAL = 1024
"""Bytes of a tensor that is worth a place in the second file."""


def check(path: Path) -> None:
    """Raises OSError when `write` could not write there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file to write")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent}: no such folder to write into")
    with _folder_beside(path):
        pass


def write(model: ir.Model, path: Path) -> int:
    """Writes ``path``, and for large models ``path`` with ``.data`` at its end.

    Both are written elsewhere in the folder and moved.

    Returns:
        The bytes written.

    Raises:
        OSError: the place cannot be written; what was there before is untouched.
    """
    from onnxscript import ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = f"{path.name}.data" if weights > _LARGEST else None
    with _folder_beside(path) as folder:
        ir.save(
            model,
            Path(folder, path.name),
            external_data=data,
            size_threshold_bytes=_SMALLEST_EXTERNAL,
        )
        # The data first: a model without its data cannot be read.
        made = [Path(folder, name) for name in (data, path.name) if name is not None]
        nbytes = sum(file.stat().st_size for file in made)
        for file in made:
            os.replace(file, path.with_name(file.name))
    return nbytes


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=".sparsify-", dir=path.absolute().parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
