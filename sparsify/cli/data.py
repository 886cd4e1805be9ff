"""Calibration data on the command line: a text, or arrays of inputs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsify.calibration import Calibration
from sparsify.cli.huggingface import has_tokenizer
from sparsify.cli.models import LoadedModel

_WINDOW, _WINDOWS = 128, 16
"""Tokens of a batch of text, and batches at most."""


def read_calibration(path: Path, loaded: LoadedModel) -> Calibration:
    """The data of a file, for the model.

    Args:
        path: ``.txt``, for a Hugging Face folder with a tokenizer: windows of 128 tokens, the
            first 16; ``.npy``, the only input; ``.npz``, inputs by their names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, or no text can be made into inputs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    if path.suffix == ".txt":
        return Calibration(_windows(path, loaded))
    if path.suffix == ".npy":
        return Calibration([torch.from_numpy(np.load(path, allow_pickle=False))])
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return Calibration([{name: torch.from_numpy(array) for name, array in arrays.items()}])
    raise ValueError(f"--data {path}: must be a .txt, .npy or .npz file")


def _windows(path: Path, loaded: LoadedModel) -> list[Any]:
    folder = Path(loaded.name)
    if not has_tokenizer(folder):
        raise ValueError(
            f"--data {path}: text needs a model in a folder with its tokenizer; give arrays of "
            "inputs as .npy or .npz"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(path.read_text(), return_tensors="pt").input_ids[0]
    count = min(_WINDOWS, len(ids) // _WINDOW)
    rows = ids[: count * _WINDOW].reshape(count, _WINDOW) if count else ids[None]
    if loaded.generates:
        return list(rows)
    accepted = inspect.signature(loaded.module.forward).parameters
    given = ({"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows)
    return [{n: t for n, t in batch.items() if n in accepted} for batch in given]
