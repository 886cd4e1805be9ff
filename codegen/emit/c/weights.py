"""The file of weights that exported C reads, or has linked in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sparsify.codegen.emit.c.arena import ALIGNMENT, aligned
from sparsify.codegen.emit.c.straight import StraightCode
from sparsify.program import Program


class Weights:
    """The file of weights: 64 bytes that identify it, then each tensor, aligned."""

    def __init__(self) -> None:
        self.nbytes = ALIGNMENT
        self._offsets: dict[str, int] = {}
        self._tensors: list[torch.Tensor] = []
        self._identity: bytes | None = None

    def add(self, code: StraightCode, program: Program) -> list[int]:
        """Offsets of the weights of an entry, in its order; weights of one name are kept once."""
        names = program.weight_names
        order = [names[n.name] for n in program.graph.nodes if n.op == "placeholder"
                 and n.name in names]  # fmt: skip
        stored = program.exported.state_dict
        found = [self.place(name, stored[name])[0] for name in order]
        for index, constant in enumerate(code.constants):
            name = f"{code.name}.constant.{index}"
            raw = constant.reshape(-1).view(np.uint8)  # PyTorch lacks some types of NumPy's
            found.append(self.place(name, torch.from_numpy(raw.copy()))[0])
        return found

    def place(self, name: str, tensor: torch.Tensor) -> tuple[int, int]:
        """The tensor's offset and size in bytes."""
        if name not in self._offsets:
            self._offsets[name] = self.nbytes
            self._tensors.append(tensor.detach().contiguous())
            self._identity = None
            self.nbytes += aligned(tensor.nbytes)
        return self._offsets[name], tensor.nbytes

    def _parts(self) -> Iterator[bytes]:
        for tensor in self._tensors:
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            yield data + bytes(-len(data) % ALIGNMENT)

    def identity(self) -> bytes:
        """``sparsify``, 24 spare bytes, and the SHA-256 of what follows."""
        if self._identity is None:
            total = hashlib.sha256()
            for part in self._parts():
                total.update(part)
            self._identity = b"sparsify".ljust(ALIGNMENT - 32, b"\0") + total.digest()
        return self._identity

    def write(self, path: Path) -> None:
        with open(path, "wb") as file:
            file.write(self.identity())
            file.writelines(self._parts())
