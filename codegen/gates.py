"""Which kernels compute a gate: one file of rules registers a `GateKernels` for each.

A gate without one is left to PyTorch, as any other operator without kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from sparsify.gates import Gate

if TYPE_CHECKING:
    from sparsify.codegen.kernels.cpu.gate import Token

Dropped = Callable[[Any, int], Any]
"""``dropped(at, width)``: a condition for each of ``width`` features at an offset."""


class GateKernels(Protocol):
    """How kernels find the features that a rule drops."""

    @property
    def gate(self) -> type[Gate]: ...

    def dropped(self, gate: Any, token: Token) -> Dropped:
        """Emits what is computed once for a token; returns what is computed for its features.

        NaN must not be dropped.
        """
        ...


_KERNELS: dict[str, GateKernels] = {}


def register_gate(kernels: GateKernels) -> None:
    known = _KERNELS.setdefault(kernels.gate.name, kernels)
    if type(known) is not type(kernels):
        raise ValueError(f"gate {kernels.gate.name!r} already has kernels: {type(known)}")


def gate_kernels(gate: Gate) -> GateKernels | None:
    """The kernels of a gate; None where there are none."""
    from sparsify.codegen.kernels import cpu  # noqa: F401  (they register themselves)

    return _KERNELS.get(gate.name)
