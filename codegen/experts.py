"""Which kernels serve the experts of a mixture whose weights are in a given layout.

A layout becomes usable for experts by one file that registers an `ExpertKernels`; passes, the cost
model and lowering find it here. Both projections of an expert are in layouts of one kind, since
what is between them is in the form that this kind computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsify.codegen.isa import Isa
from sparsify.layouts import Layout, Stack
from sparsify.ops import ExpertsShape

if TYPE_CHECKING:
    from sparsify.codegen.lower import Lowering


@dataclass(frozen=True)
class ExpertsCall:
    """One operator ``experts``, but for the number of tokens.

    Attributes:
        up, down: the weights.
        slots: experts of a token at most.
    """

    shape: ExpertsShape
    up: Stack
    down: Stack
    activation: str
    bias: bool
    slots: int


class ExpertKernels(Protocol):
    """The kernels of one kind of layout."""

    @property
    def layout(self) -> type[Layout]: ...

    def candidates(self, isa: Isa, rows: int, columns: int) -> tuple[Layout, ...]:
        """Parameter choices worth considering for matrices of this shape."""
        ...

    def cycles(self, isa: Isa, stack: Stack, density: float, tokens: float, active: float) -> float:
        """Predicted core cycles when ``active`` matrices have ``tokens`` tokens each."""
        ...

    def emit(
        self,
        lowering: Lowering,
        call: ExpertsCall,
        x: Any,
        experts: Any,
        weights: Any,
        up: Sequence[Any],
        down: Sequence[Any],
        bias: Sequence[Any],
    ) -> Any:
        """Calls the kernels; returns ``[tokens, out_features]``.

        Args:
            x: ``[tokens, in_features]``.
            experts, weights: ``[tokens, slots]``, of which -1 stands for none.
        """
        ...


_EXPERTS: dict[str, ExpertKernels] = {}


def register_experts(kernels: ExpertKernels) -> None:
    known = _EXPERTS.setdefault(kernels.layout.name, kernels)
    if type(known) is not type(kernels):
        raise ValueError(
            f"layout {kernels.layout.name!r} already has expert kernels: {type(known)}"
        )


def expert_kernels(layout: Layout) -> ExpertKernels:
    """The kernels of a layout.

    Raises:
        LookupError: naming the layouts that have kernels.
    """
    found = all_expert_kernels()
    if layout.name not in found:
        raise LookupError(
            f"no CPU kernel for experts in layout {layout.spec!r}; there are {sorted(found)}"
        )
    return found[layout.name]


def all_expert_kernels() -> dict[str, ExpertKernels]:
    """By the name of their layout; kernel files register themselves when imported."""
    from sparsify.codegen.kernels import cpu  # noqa: F401

    return _EXPERTS
