"""What a model remembers from run to run: one block, in which all entries find it by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.c_names import member_name
from sparsify.codegen.emit.c.arena import Bounds, aligned
from sparsify.codegen.emit.c.straight import ExportError, StraightCode

_C_TYPES = {"float32": "float", "float64": "double", "int64": "int64_t", "int32": "int32_t",
            "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t",
            "bool": "uint8_t"}  # fmt: skip


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state.

    Attributes:
        offset: in the block, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def member(self) -> str:
        """Of the struct; ``memory`` is the struct's own."""
        return "memory_" if self.name == "memory" else member_name(self.name)

    @property
    def c_type(self) -> str:
        return _C_TYPES.get(self.dtype, "void")

    @property
    def text(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


class StateLayout:
    """Places each tensor once, however many entries have it."""

    def __init__(self) -> None:
        self.tensors: dict[str, StateTensor] = {}
        self.nbytes = 0

    def add(self, code: StraightCode, names: tuple[str, ...], bounds: Bounds) -> list[int]:
        """Offsets of an entry's state, in its order.

        Raises:
            ExportError: another entry has a tensor of this name and another shape or type.
        """
        for name, view in zip(names, code.state, strict=True):
            size = bounds.nbytes(view)
            made = StateTensor(name, view.dtype, bounds.shape(view), self.nbytes, size)
            known = self.tensors.setdefault(name, made)
            if (known.dtype, known.shape) != (made.dtype, made.shape):
                raise ExportError(
                    f"state {name!r} is {made.text} for entry {code.name!r} and {known.text} for "
                    "another; entries share their state, so give the same largest shape to all"
                )
            if known is made:
                self.nbytes += aligned(size)
        return [self.tensors[name].offset for name in names]

    def begin(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A first value in the type and shape of the state that it is for.

        Raises:
            ExportError: it cannot be broadcast to that shape, or loses what that type cannot hold.
        """
        known = self.tensors[name]
        dtype = getattr(torch, known.dtype)
        try:
            if torch.can_cast(value.dtype, dtype):
                return value.to(dtype).expand(known.shape)
        except RuntimeError:
            pass  # of expand
        raise ExportError(
            f"state {name!r} is {known.text} and cannot begin as {str(value.dtype)[6:]} "
            f"{list(value.shape)}"
        )
