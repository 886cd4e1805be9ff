"""Sparsity patterns of pruned networks from the Deep Learning Matrix Collection (DLMC).

Source: Gale, Zaharia, Young and Elsen, "Sparse GPU Kernels for Deep Learning", 2020. A pattern is
a file ``MODEL/METHOD/SPARSITY/LAYER.smtx``: ``rows, cols, nnz``, the row offsets, the columns.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Pattern:
    """Where one layer's weight, ``[out_features, in_features]``, is not zero."""

    model: str
    sparsity: str
    layer: str
    mask: torch.Tensor


def read(path: Path) -> Iterator[Pattern]:
    """The patterns of a folder, or of a tar archive of one, in the order of their names.

    Raises:
        FileNotFoundError: no such path, or no pattern in it.
        ValueError: naming the file that is no pattern.
    """
    if path.is_file():
        with tempfile.TemporaryDirectory(prefix="dlmc-") as folder, tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
            yield from read(Path(folder))
        return
    files = sorted(path.rglob("*.smtx"))
    if not files:
        raise FileNotFoundError(f"no *.smtx file under {path}")
    for file in files:
        *_, model, _, sparsity, name = file.parts
        yield Pattern(model, sparsity, name.removesuffix(".smtx"), mask(file))


def mask(file: Path) -> torch.Tensor:
    """A pattern's file as a bool matrix."""
    head, offsets, columns = [*file.read_text().splitlines(), "", "", ""][:3]
    try:
        rows, width, nnz = (int(n) for n in head.split(","))
        starts, column = (np.array(line.split(), np.int64) for line in (offsets, columns))
    except ValueError as error:
        raise ValueError(f"{file} is not a DLMC pattern: {error}") from None
    lengths = np.diff(starts)
    if lengths.size != rows or (lengths < 0).any() or not lengths.sum() == column.size == nnz:
        raise ValueError(
            f"{file} says {rows} rows and {nnz} nonzeros, but has {lengths.size} and {column.size}"
        )
    found = torch.zeros(rows, width, dtype=torch.bool)
    found[np.repeat(np.arange(rows), lengths), column] = True
    return found
