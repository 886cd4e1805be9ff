"""How scores of attention are made of products, and which of them a window hides."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.math import LOG2E, Vector, tanh
from sparsify.codegen.kernels.cpu.simd import Expr, bind, in_name, splat


@dataclass(frozen=True)
class Scores:
    """How scores are made of products, in the domain of exp2, and which keys a query sees.

    Attributes:
        window: a query sees the last ``window`` keys up to its own; 0: all of them.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)``; 0: they stay as they are.
            Known when a kernel is made, or brought by each call as the scale is then too.
    """

    scale: Expr | float
    window: int
    softcap: Expr | float

    @property
    def name(self) -> str:
        return f"s{in_name(self.scale)}_w{self.window}_c{in_name(self.softcap)}"

    @property
    def capped(self) -> Expr | bool:
        return self.softcap != 0 if self._known else self.softcap > T.float32(0.0)

    @property
    def factor(self) -> Expr | float:
        """What queries are multiplied by before the products."""
        if self._known:
            return self.scale / self.softcap if self.softcap else self.scale * LOG2E
        plain = self.scale * T.float32(LOG2E)
        return bind(T.Select(self.capped, self.scale / self.softcap, plain))

    def value(self, product: Expr, width: int, isa: Isa) -> Expr:
        """The score of such a query's product with a key; a cap of each call's is applied."""
        if self._known and not self.softcap:
            return product
        bound = tanh(Vector(product, width, isa))
        if self._known:
            return (bound * (self.softcap * LOG2E)).value
        return bind(bound.value * splat(self.softcap * T.float32(LOG2E), width))

    @property
    def _known(self) -> bool:
        return isinstance(self.softcap, int | float)

    def lowest(self, position: Expr) -> Expr:
        """The first key that the query at ``position`` sees."""
        return T.max(position - (self.window - 1), T.int64(0)) if self.window else T.int64(0)
