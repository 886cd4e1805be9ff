"""Runs a compiled library: one virtual machine for each call in flight, on the shared pool."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax

from sparsify.codegen.runtime import pool
from sparsify.memory import contiguous_copy, in_place

Entry = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]

_UNEQUAL_SIZES = re.compile(r"heap_data\[reg\] \((\d+) vs\. (\d+)\)")
"""What TVM's virtual machine says of a tensor with another size than the program expects."""


class Executor:
    """A loaded library.

    A virtual machine holds the state of one call, so calls borrow machines from a stack that grows
    to the number of calls ever in flight at once; nothing belongs to a thread or outlives the
    executor.
    """

    def __init__(self, library: Path, num_threads: int) -> None:
        self._module = tvm.runtime.load_module(str(library))
        pool.redirect(library)
        self._machines: deque[relax.VirtualMachine] = deque([self._machine()])
        self.num_threads = num_threads

    def _machine(self) -> relax.VirtualMachine:
        return relax.VirtualMachine(self._module, tvm.cpu())

    def bind(self, entry: str, weights: Sequence[torch.Tensor]) -> Entry:
        """A thread-safe callable from an entry's inputs to its outputs.

        Weights are shared, not copied, except those that are not 64-byte aligned. So are inputs:
        an entry that changes one in place must be given one that needs no copy.

        Raises:
            ValueError: by the callable, for inputs of sizes that the program does not allow.
        """
        held = [tvm.runtime.from_dlpack(aligned(weight.detach())) for weight in weights]

        def call(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            try:
                machine = self._machines.pop()
            except IndexError:
                machine = self._machine()
            try:
                with pool.use_threads(self.num_threads):
                    results: Any = machine[entry](*map(aligned, inputs), *held)
            except RuntimeError as error:
                if unequal := _UNEQUAL_SIZES.search(str(error)):
                    raise _do_not_fit(entry, inputs, *unequal.groups()) from error
                raise
            finally:
                self._machines.append(machine)
            return tuple(torch.from_dlpack(result) for result in results)

        return call


def _do_not_fit(entry: str, inputs: Sequence[torch.Tensor], found: str, wanted: str) -> ValueError:
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    return ValueError(
        f"{entry}: inputs of shapes {shapes} do not go through the model: a tensor has {found} "
        f"where its shape wants {wanted}; many models take only multiples of their strides, or "
        "inputs whose sizes agree"
    )


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if kernels can read it as it lies, else a copy that they can."""
    return tensor if in_place(tensor) else contiguous_copy(tensor)
