"""Attention with any number of heads of any size; see `sparsify.codegen.kernels.cpu.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.flash import FlashTiles, place_in_lanes
from sparsify.codegen.kernels.cpu.math import LOG2E
from sparsify.codegen.kernels.cpu.simd import (
    Expr,
    Integer,
    Number,
    Tensor,
    arguments,
    bind,
    load,
    prim_func,
    splat,
    symbol,
)
from sparsify.layouts import LANES

Mask = Literal["none", "keys", "queries"]
"""What a mask varies over besides sequences and heads: the keys alone, or the queries too."""


@dataclass(frozen=True)
class GeneralAttention:
    """The kernel's specification; ``vectors`` is the query tile."""

    isa: Isa
    mask: Mask
    vectors: int

    @property
    def name(self) -> str:
        return f"general_attention_{self.isa.name}_mask_{self.mask}_v{self.vectors}"

    def build(self) -> Any:
        """A PrimFunc ``(query, key, value[, mask, batch_step, head_step], batch, queries, keys,
        reach, heads, kv_heads, head_dim, query_offset, key_offset, value_offset, scale, y)``.

        Activations are in lanes, ``[groups, features, 16]``. The mask is what `AttentionMask`
        makes, ``[planes, keys, padded queries or 1]``; a sequence's plane lies ``batch_step``
        floats after the one before, a head's ``head_step``. Query ``i`` sees key ``j`` only if
        ``j <= i + reach``: 0 is causal, the number of keys hides none.
        """
        return _Emitter(self).build()


class _Emitter(FlashTiles):
    def __init__(self, spec: GeneralAttention) -> None:
        super().__init__(spec.isa, (1, 1, 1), spec.vectors, 0, 0, 1.0, LANES)
        self.spec = spec

    def build(self) -> Any:
        masked = self.spec.mask != "none"
        with prim_func(self.spec.name) as result:
            self.groups, key_groups, value_groups = symbol(), symbol(), symbol()
            query_features, self.key_features, self.value_features = symbol(), symbol(), symbol()
            planes, mask_keys, self.padded = symbol(), symbol(), symbol()
            names = ("batch", "queries", "keys", "reach", "heads", "kv_heads", "head_dim")
            offsets = ("query_offset", "key_offset", "value_offset")
            self.query, self.key, self.value, self.mask, *rest = arguments(
                Tensor("query", (self.groups, query_features, LANES)),
                Tensor("key", (key_groups, self.key_features, LANES)),
                Tensor("value", (value_groups, self.value_features, LANES)),
                Tensor("mask", (planes, mask_keys, self.padded)) if masked else None,
                Integer("batch_step") if masked else None,
                Integer("head_step") if masked else None,
                *(Integer(name) for name in (*names, *offsets)),
                Number("scale"),
                Tensor("y", (self.groups, symbol(), LANES)),
            )
            self.batch_step, self.head_step, batch, self.queries, self.keys, *rest = rest
            self.reach, *rest = rest
            heads, kv_heads, head_dim, offset, self.key_offset, self.value_offset, *rest = rest
            scale, self.y = rest
            # At least one: TVM's analyser would try a division by zero heads.
            heads = bind(T.max(heads, T.int64(1)))
            factor = bind(scale * T.float32(LOG2E))
            self.set_sizes((heads, kv_heads, head_dim), query_features, offset, factor)
            self.emit(batch)
        return result[0]

    def keys_of_tile(self, sequence: Expr, head: Expr, kv_head: Expr) -> tuple[Expr, Expr]:
        self.key_token = bind(sequence * self.keys)
        self.key_feature = bind((self.key_offset + kv_head * self.head_dim) * LANES)
        self.value_feature = bind((self.value_offset + kv_head * self.head_dim) * LANES)
        if self.mask is not None:
            self.mask_at = bind(sequence * self.batch_step + head * self.head_step)
        return T.int64(0), bind(T.min(self.keys, self.first + self.tile + self.reach))

    def key_place(self, key: Expr) -> Expr:
        return place_in_lanes(self.key_token + key, self.key_features) + self.key_feature

    def value_place(self, key: Expr) -> Expr:
        return place_in_lanes(self.key_token + key, self.value_features) + self.value_feature

    def score(self, product: Expr, key: Expr, vector: int) -> Expr:
        width, score = self.width, product
        first = self.first + vector * width
        if self.spec.mask == "queries":
            score = score + load(self.mask, self.mask_at + key * self.padded + first, width)
        elif self.spec.mask == "keys":
            score = score + splat(self.mask[self.mask_at + key], width)
        lanes = T.Ramp(first, T.int64(1), width)
        hidden = T.Broadcast(key - self.reach, width) > lanes
        return T.Select(hidden, splat(float("-inf"), width), score)
