"""Blocks weighed by the pattern that a tensor names for their head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.block_weights import BlockWeights, QueryBlock
from sparsify.codegen.kernels.cpu.line_weights import LineWeights
from sparsify.codegen.kernels.cpu.nearness_weights import NearnessWeights
from sparsify.codegen.kernels.cpu.pooled_weights import PooledWeights
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, bind, choose, require
from sparsify.selectors import PATTERNS, BlockScoring

if TYPE_CHECKING:
    from sparsify.codegen.kernels.cpu.select_blocks import SelectBlocks

_BY_SCORING: dict[BlockScoring | None, type[BlockWeights]] = {
    "nearness": NearnessWeights,
    "lines": LineWeights,
    "pooled": PooledWeights,
}
_MEMBERS = [_BY_SCORING[pattern.scoring] for pattern in PATTERNS.values()]


class HeadPatternWeights(BlockWeights):
    """Each head is weighed by one member, and no other member looks at its queries or keys."""

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        self.names = [self._names(number) for number in range(len(_MEMBERS))]
        self.members = [
            member(*(*operands, names)) for member, names in zip(_MEMBERS, self.names, strict=True)
        ]

    @classmethod
    def operand(cls, spec: SelectBlocks) -> Tensor:
        return Tensor("patterns", (spec.heads,), "int32")

    def _names(self, number: int) -> Callable[[Expr], Expr]:
        """Whether a head has the pattern of this number."""
        return lambda head: self.tensor[head] == number

    def allocate(self) -> None:
        for member in self.members:
            member.allocate()

    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        with T.serial(T.int64(self.spec.heads)) as head:
            number = self.tensor[head]
            require(
                T.And(number >= 0, number < len(_MEMBERS)),
                f"select_blocks: patterns must be at least 0 and below {len(_MEMBERS)}",
                "ValueError",
            )
        for member in self.members:
            member.prepare(lengths, counts, length)

    def weigh(self, row: QueryBlock) -> None:
        named = [bind(names(row.head)) for names in self.names]

        def by(number: int) -> None:
            choose(
                number + 1 < len(self.members),
                named[number],
                lambda: self.members[number].weigh(row),
                lambda: by(number + 1),
            )

        by(0)
