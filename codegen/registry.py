"""Which kernels serve a linear operator whose weight is in a given layout.

A layout becomes usable on a target by one file of kernels that registers a `LinearKernels` for
it, for activations in lanes (many tokens), as rows (few tokens), or one for each. Passes, the cost
model and lowering find it here and need no change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sparsify.codegen.isa import Isa
from sparsify.contracts import Side
from sparsify.layouts import Form, Layout, form_of


class Kernel(Protocol):
    """A kernel's frozen specification: equal names mean equal code."""

    @property
    def name(self) -> str: ...

    def build(self) -> Any:
        """The TIR PrimFunc."""
        ...


@dataclass(frozen=True)
class LinearSite:
    """A linear operator as kernels see it: the weight's shape and what follows the sum."""

    out_features: int
    in_features: int
    bias: bool = False
    activation: str = "none"
    residual: bool = False


class LinearKernels(Protocol):
    """The kernels of one layout on CPUs, for one form of activations."""

    @property
    def layout(self) -> type[Layout]: ...

    @property
    def form(self) -> Form: ...

    def candidates(self, isa: Isa, shape: tuple[int, int], nnz: int) -> tuple[Layout, ...]:
        """Parameter choices worth considering for a weight of this shape and nonzero count."""
        ...

    def kernel(self, isa: Isa, site: LinearSite, layout: Any) -> Kernel:
        """Takes ``(x, *packed tensors[, bias][, residual], y)``, activations in ``form``."""
        ...

    def cycles(self, isa: Isa, layout: Any, shape: tuple[int, int], nnz: int, tokens: int) -> float:
        """Predicted core cycles of one call on one thread."""
        ...

    def tasks(self, isa: Isa, layout: Any, shape: tuple[int, int], tokens: int) -> int:
        """Equal parts into which one call is divided between threads."""
        ...


@runtime_checkable
class GatedKernels(Protocol):
    """`LinearKernels` that can apply the gate of a gated feed-forward network as well."""

    def gated_kernel(
        self, isa: Isa, site: LinearSite, layout: Any, activation: str
    ) -> Kernel | None:
        """Takes what the kernel of the site takes and fills half as many features with
        ``activation(first half) * second half``; None where a weight in this layout cannot be so
        computed.
        """
        ...


@runtime_checkable
class SkippingKernels(Protocol):
    """`LinearKernels` for rows with a kernel that does not compute what is zero at run time."""

    @property
    def side(self) -> Side:
        """Where it looks for zeros: in its inputs, or in a gate of its outputs."""
        ...

    def skipping_candidates(self, isa: Isa, shape: tuple[int, int]) -> tuple[Layout, ...]: ...

    def skipping_kernel(self, isa: Isa, site: LinearSite, layout: Any) -> Kernel:
        """Takes what the kernel of the site takes; for ``outputs`` the gate follows ``x``, and
        there is neither activation nor residual."""
        ...

    def skipping_cycles(
        self, isa: Isa, layout: Any, shape: tuple[int, int], tokens: int, share: float
    ) -> float:
        """Predicted cycles of a call in which so large a share is not zero."""
        ...


@runtime_checkable
class StallingKernels(Protocol):
    """`LinearKernels` that do not read weights from memory as fast as a core can."""

    def bandwidth(self, isa: Isa, layout: Any, tokens: int) -> float:
        """The share of memory's bandwidth that they reach."""
        ...


_LINEAR: dict[tuple[str, Form], LinearKernels] = {}


def register_linear(kernels: LinearKernels) -> None:
    known = _LINEAR.setdefault((kernels.layout.name, kernels.form), kernels)
    if type(known) is not type(kernels):
        raise ValueError(
            f"layout {kernels.layout.name!r} already has kernels for {kernels.form}: {type(known)}"
        )


def linear_kernels(layout: Layout, tokens: int) -> LinearKernels:
    """The kernels that serve a layout at a token count.

    Those for the form of so many tokens, else those for the other: activations are converted
    around them.

    Raises:
        LookupError: naming the layouts that have kernels.
    """
    _load()
    wanted = form_of(tokens)
    other: Form = "lanes" if wanted == "rows" else "rows"
    for form in (wanted, other):
        if (layout.name, form) in _LINEAR:
            return _LINEAR[layout.name, form]
    known = sorted({name for name, _ in _LINEAR})
    raise LookupError(f"no CPU kernel for layout {layout.spec!r}; there are {known}")


def skipping_kernels(layout: Layout, side: Side) -> SkippingKernels | None:
    """The kernels of a layout that skip what is zero on a side; None where it has none."""
    _load()
    found = _LINEAR.get((layout.name, "rows"))
    return found if isinstance(found, SkippingKernels) and found.side == side else None


def all_linear_kernels() -> tuple[LinearKernels, ...]:
    _load()
    return tuple(_LINEAR.values())


def _load() -> None:
    """Kernel files register themselves when imported."""
    from sparsify.codegen.kernels import cpu  # noqa: F401
