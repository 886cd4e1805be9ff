"""An attention mask brought into the form the attention kernel adds: keys major, log2 domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.kernels.cpu.math import LOG2E
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
    store,
    symbol,
)

QUERY_PADDING = 64
"""Queries of a prepared mask are padded to a multiple of this, so that tiles load whole vectors."""

_FINITE_LOWEST = -1e30
_LARGEST_NEGATIVE = -3.4028234663852886e38
"""Only minus infinity is below it."""


@dataclass(frozen=True)
class MaskShape:
    """Which of batch, heads and queries a mask varies over; it always varies over keys."""

    batch: bool
    heads: bool
    queries: bool

    @property
    def name(self) -> str:
        flags = zip("bhq", (self.batch, self.heads, self.queries), strict=True)
        return "".join(letter for letter, varies in flags if varies) + "k"

    def offset(self, sequence: Expr, head: Expr, extents: tuple[Expr, ...]) -> Expr:
        """Offset of a sequence's and head's plane in ``[batch, heads, keys, queries]``."""
        plane = T.int64(0)
        if self.batch:
            plane = plane + sequence * extents[1]
        if self.heads:
            plane = plane + head
        return plane * extents[2] * extents[3]

    def value(
        self, mask: Expr, at: Expr, key: Expr, query: Expr, extents: tuple[Expr, ...], width: int
    ) -> Expr:
        """What a vector of queries' scores of one key is increased by."""
        if self.queries:
            return load(mask, at + key * extents[3] + query, width)
        return splat(mask[at + key], width)


@dataclass(frozen=True)
class AttentionMask:
    """The kernel's specification: ``dtype`` is ``bool`` (True: attend) or ``float32`` (added)."""

    shape: MaskShape
    dtype: str

    @property
    def name(self) -> str:
        return f"attention_mask_{self.shape.name}_{self.dtype}"

    def build(self) -> Any:
        """A PrimFunc ``(mask[b, h, queries, keys], y[b, h, keys, padded queries or 1])``.

        False is minus infinity: a query that sees no key attends to nothing. Large negative
        numbers stay finite, so that a query all of whose keys have one attends to all alike. Both
        are as in PyTorch.
        """
        with prim_func(self.name) as result:
            batch, heads, queries, keys, padded = (symbol() for _ in range(5))
            mask, y = arguments(
                Tensor("mask", (batch, heads, queries, keys), self.dtype),
                Tensor("y", (batch, heads, keys, padded)),
            )
            with T.parallel(batch * heads * keys) as row:
                plane, key = bind(T.floordiv(row, keys)), bind(T.floormod(row, keys))
                with T.serial(padded) as query:
                    inside = T.min(query, queries - 1)
                    value = mask[(plane * queries + inside) * keys + key]
                    store(y, row * padded + query, self._added(value), 1)
        return result[0]

    def _added(self, value: Expr) -> Expr:
        if self.dtype == "bool":
            return T.Select(value, T.float32(0.0), T.float32(float("-inf")))
        added = T.max(T.float32(_FINITE_LOWEST), value * T.float32(LOG2E))
        return T.Select(value < T.float32(_LARGEST_NEGATIVE), T.float32(float("-inf")), added)
