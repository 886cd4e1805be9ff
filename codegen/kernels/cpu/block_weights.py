"""How blocks of keys are weighed for a block of queries: the members of `SelectBlocks`.

Each has scratch of its own, which `prepare` fills with what it knows of all blocks of keys before
any block of queries is looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.paged_cache import PAGE, CacheOperands
from sparsify.codegen.kernels.cpu.query_tiles import place_in_lanes
from sparsify.codegen.kernels.cpu.simd import Expr, Tensor, bind
from sparsify.layouts import LANES

if TYPE_CHECKING:
    from sparsify.codegen.kernels.cpu.select_blocks import SelectBlocks

LOWEST = -3e38


@dataclass(frozen=True)
class QueryBlock:
    """One block of queries of one head, and where its weights go.

    Attributes:
        sequence, head: of the batch; of the query heads.
        token, real: its first token in the query tensor, and how many of its tokens are real.
        blocks: of keys that it may see; their weights go to ``weights`` from ``at`` on.
        total: keys of the sequence.
    """

    sequence: Expr
    head: Expr
    token: Expr
    real: Expr
    blocks: Expr
    total: Expr
    weights: Expr
    at: Expr


class BlockWeights(ABC):
    """One way of weighing.

    Attributes:
        tensor: the `operand`, None without one.
        columns: blocks of keys that a page table has room for.
        wanted: whether it weighs for a query head, so that others are not prepared; None: for all.
    """

    def __init__(
        self,
        spec: SelectBlocks,
        cache: CacheOperands,
        query: Expr,
        keys: Expr,
        tensor: Expr,
        columns: Expr,
        wanted: Callable[[Expr], Expr] | None = None,
    ) -> None:
        self.spec, self.cache = spec, cache
        self.query, self.keys, self.tensor, self.columns = query, keys, tensor, columns
        self.wanted = wanted
        self.width, self.dim = spec.isa.vector, spec.head_dim
        self.size = spec.block[1] * PAGE

    @classmethod
    def operand(cls, spec: SelectBlocks) -> Tensor | None:
        """What it reads besides the query and the keys."""
        return None

    @abstractmethod
    def allocate(self) -> None:
        """Takes scratch, where the function begins."""

    @abstractmethod
    def prepare(self, lengths: Expr, counts: Expr, length: Expr) -> None:
        """Fills the scratch."""

    @abstractmethod
    def weigh(self, row: QueryBlock) -> None:
        """Writes the weights of the blocks of keys that a block of queries may see."""

    def _kv_head(self, head: Expr) -> Expr:
        return bind(T.floordiv(head * self.spec.kv_heads, self.spec.heads))

    def _query_place(self, token: Expr, head: Expr) -> Expr:
        """Offset of feature 0 of a token's query."""
        feature = (self.spec.offset + head * self.dim) * LANES
        return place_in_lanes(token, self.spec.features) + feature
