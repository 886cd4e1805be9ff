"""Numbers that a handler calculates while it is traced, as constants of the program."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsify.frontend.onnx.values import untraced


def table(values: Any, dtype: torch.dtype) -> torch.Tensor:
    """An array, or a number, of this type; exporting lifts it as it is."""
    with untraced():
        return torch.tensor(np.ravel(values), dtype=dtype).reshape(np.shape(values))
